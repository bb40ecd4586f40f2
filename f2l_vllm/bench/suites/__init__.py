"""The suites: each has a module that measures, and a YAML file of what it measures by default."""
