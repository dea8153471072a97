"""One Task per modality: the only objects that know it."""
