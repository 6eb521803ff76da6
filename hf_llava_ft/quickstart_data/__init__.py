"""Five photographs and what is asked about them: the data of `llava-ft quickstart` and of the tests (rights: README.md)."""
