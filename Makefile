# Two commands on a fresh machine: `make demo` (the main job on real packets), `make test`.
# Both install what they need (as root, Debian's packages).

CARGO ?= cargo
FUZZ_SECONDS ?= 60
DEMO ?=

.PHONY: build demo test test-long test-cluster image-root check fences fuzz deny bench ci

build:
	@.ci/packages build
	$(CARGO) build --release --workspace --bins

demo: build
	@.ci/packages lab
	target/release/lab demo $(if $(KEEP),--keep) $(DEMO)

test:
	@.ci/packages build
	@.ci/packages lab
	$(CARGO) build --release --workspace --bins
	$(CARGO) test --release --workspace
	target/release/lab check

# What takes too long for every change.
test-long:
	@.ci/packages build
	.ci/mutations

# Real kube-apiserver, etcd and kube-proxy, built from their Go modules into the user's cache: needs go.
test-cluster:
	@.ci/packages build
	@.ci/packages lab
	$(CARGO) build --release -p sluice -p cluster
	target/release/cluster $(if $(CLUSTERS),--clusters $(CLUSTERS)) $(if $(SEED),--seed $(SEED))

# The stages of deploy/Dockerfile in a folder, and the binary in it under chroot.
image-root:
	@.ci/packages build
	$(CARGO) build --release -p sluice
	deploy/image-root target/image-root

check: fences
	@.ci/packages build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet
	$(CARGO) test --workspace --lib --bins --quiet

# Crates point one way, and nothing of the cluster reaches the packet path (style: section 3).
fences:
	@! $(CARGO) tree -p dataplane -e normal --prefix none | grep -E '^(kube|k8s-openapi|tokio|serde_json|serde-saphyr) ' \
		|| { echo "dataplane must not depend on the crates above"; exit 1; }
	@.ci/unused-dependencies

fuzz:
	@.ci/packages build
	$(MAKE) -C dataplane/fuzz SECONDS_EACH=$(FUZZ_SECONDS)

deny:
	@command -v cargo-deny >/dev/null || $(CARGO) install --quiet --locked cargo-deny
	$(CARGO) deny check bans licenses sources

bench: build
	@.ci/packages lab
	@.ci/packages bench
	$(CARGO) bench --workspace
	target/release/lab bench

ci: check test test-cluster image-root fuzz deny
