"""Five photographs and three questions about each: what `llava-ft quickstart` trains on (rights: README.md)."""
