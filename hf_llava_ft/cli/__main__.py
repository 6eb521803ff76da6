"""`python -m hf_llava_ft.cli`."""

from hf_llava_ft.cli import main

if __name__ == "__main__":
    main()
