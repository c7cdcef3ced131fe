"""The corpus ``homeassistant``: user-interface text from a pinned wheel."""
