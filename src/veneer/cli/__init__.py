"""The command line, a file a command. Nothing heavy is imported until a command runs."""
