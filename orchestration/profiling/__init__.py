"""Where the time of a training step goes: the parts of a rank's steps, bytes on the wire, a trace for Perfetto."""
