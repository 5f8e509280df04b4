"""The documentation as a site, and the links between its pages."""
