"""The verbs of the command line: each is a function whose parameters are its flags."""
