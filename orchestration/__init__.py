"""The service around the models: Ray Train runs them, DeepSpeed shards them, MLflow shows and keeps them."""
