"""The kinds of tasks: how each is learned and measured."""
