"""A run's folder, on local disk, shared disk or object storage: whose it is, who may write it, its checkpoints."""
