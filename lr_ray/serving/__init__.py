"""Few-shot classification as a service, all but Ray: uploads, tasks, their store, keys, and the HTTP interface."""
