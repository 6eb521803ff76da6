"""`llava-ft push`: what goes to the Hub."""
