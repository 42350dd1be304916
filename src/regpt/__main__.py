"""`python -m regpt` is `regpt`."""

from regpt.cli import entry

if __name__ == "__main__":
    entry()
