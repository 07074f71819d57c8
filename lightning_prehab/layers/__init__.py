"""The modules that take the place of dense layers, one file per kind of layer."""
