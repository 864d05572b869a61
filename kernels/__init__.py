"""Kernel API: every public function here has a plain torch reference of the same name in `reference/`."""
