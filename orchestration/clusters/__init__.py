"""Where runs run: the Ray they connect to, clusters' files checked before a machine is rented."""
