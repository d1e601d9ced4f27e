"""One file a server, found by its name; a package only so that `bench.peer.load` can import them."""
