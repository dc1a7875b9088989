"""Programs that measure opsctl and exit 1 when a bar is missed; the `*.txt` beside them is their last output."""
