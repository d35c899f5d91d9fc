"""The compression passes that recipes know, one module each: importing it registers the pass."""
