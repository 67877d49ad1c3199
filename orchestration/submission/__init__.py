"""A run on a cluster, from here: what is packed for it, the job, its log, its fate."""
