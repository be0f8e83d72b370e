"""Command line: parse, config, stage, artifact. Whatever is heavy is imported in the command that needs it."""
