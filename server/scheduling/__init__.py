"""Pure scheduling decisions: no clock, no I/O, no logging."""
