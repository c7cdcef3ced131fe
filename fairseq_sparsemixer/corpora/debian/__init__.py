"""The corpus ``debian``: English-German text of Debian's packages, in four domains.

================  =============================================================================
``preparation``   the door: from packages to ``bin/``
``extraction``    which packages hold the texts, cleaning, and how the corpus is divided
``apt``           packages and indices of descriptions, from the machine's own apt sources
``deb_archives``  Debian packages, read as archives
``descriptions``  package descriptions
``ding``          the sentences of a dictionary
``help_pages``    LibreOffice's help
``manual_pages``  manual pages
================  =============================================================================
"""
