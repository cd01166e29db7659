"""Every setting, declared once: its type, bounds, default, description, and how it is typed and shown.

Owners of a setting import it from here; the command line, recipes, plans and manifests follow the fields. Nothing here
needs torch, so that ``--help`` can say what a method's defaults are.
"""
