"""Where runs run: the Ray they connect to and what it can hold, a cluster to try here, checks of clusters' files, the
watcher that tells Ray of a spot notice."""
