"""The command line: words, options, the script that they name, and how it is run."""
