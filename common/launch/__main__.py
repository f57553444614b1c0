"""`python -m common.launch RECIPE_MODULE CONFIG OUT [a.b=c ...]`: what the launch scripts call."""

from common.errors import exit_cleanly
from common.launch.launcher import main

if __name__ == "__main__":
    exit_cleanly(main)
