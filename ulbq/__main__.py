"""``python -m ulbq``, which is what ``torchrun -m ulbq`` runs."""

from ulbq.commands.start import main

if __name__ == "__main__":
    raise SystemExit(main())
