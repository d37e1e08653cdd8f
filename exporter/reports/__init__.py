"""Reports as files: single HTML pages that need nothing else, and writing them whole or not at all."""
