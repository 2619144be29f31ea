"""What trainers need beside the optimizer: a file each, which imports it. Most need none; see `docs/trainers.md`."""
