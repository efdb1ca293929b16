"""The command line: one module for each group of commands; `main.app` puts them together."""
