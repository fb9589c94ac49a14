# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`python -m hf_mudjacking`."""

from .cli import main


raise SystemExit(main())
