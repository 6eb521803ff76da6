"""`python -m hf_llava_ft`: the same as `llava-ft`, where scripts are not on the path."""

from hf_llava_ft.cli import main

if __name__ == "__main__":
    main()
