# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
