"""The corpus ``debian``: English-German text of Debian's packages, in four domains.

======================  =========================================================================
``apt``                 packages and their descriptions, from the machine's own apt sources
``deb_archives``        Debian packages, read as archives
``descriptions``        package descriptions
``ding``                the sentences of a dictionary
``help_pages``          LibreOffice's help
``manual_pages``        manual pages
``extraction``          which packages hold them, cleaning, and how the corpus is divided
======================  =========================================================================
"""
