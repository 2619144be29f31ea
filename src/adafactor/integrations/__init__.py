"""What trainers need beside the optimizer, one file each; each imports its trainer. `docs/trainers.md` has the others."""
