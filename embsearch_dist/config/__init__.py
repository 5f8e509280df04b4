"""The typed configuration: options, sections, how files and overrides are read, how settings are compared."""
