"""The flags of `llava-ft train` before anything is imported that takes seconds: which there are, their help, and what
is said of one that there is none of."""
