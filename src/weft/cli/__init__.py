"""The command line: one file a verb. A verb's file name is the verb; the first line of its docstring is its help."""
