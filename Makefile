# overlayd: build, try out, test. `make help` lists the targets. The network ones need root.

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 3s

# For `make demo`.
NODES   ?= 3
PODS    ?= 2
BACKEND ?= vxlan
STACK   ?= ipv4
DIRECT  ?=
KEEP    ?=

# For `make faults` and `make soak`.
SHORT   ?=
ONLY    ?=
MINUTES ?= 10
SEED    ?=

.DEFAULT_GOAL := help
# For `make bench`.
QUICK   ?=

# For `make image`.
ARCHES  ?= amd64,arm64
IMAGE   ?= ghcr.io/overlayd/overlayd

.PHONY: help build demo test fuzz faults soak bench bench-go image test-image test-dist test-kubernetes conformance lint check clean deps

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

build: ## bin/overlayd, bin/overlay-cni, bin/overlay-install, bin/overlay-lab and bin/overlay-bench, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

demo: deps build $(if $(filter wireguard,$(BACKEND)),bin/wireguard-go) ## a whole network on this machine: NODES=3 PODS=2 BACKEND=vxlan|host-gw|wireguard DIRECT=1 STACK=ipv4|dual|ipv6 KEEP=1
	bin/overlay-lab demo --nodes $(NODES) --pods $(PODS) --backend $(BACKEND) --stack $(STACK) $(if $(DIRECT),--direct) $(if $(KEEP),--keep)

test: deps bin/kubernetes bin/wireguard-go ## everything, with the race detector, on the real kernel, etcd, kube-apiserver and iptables
	$(GO) vet ./...
	$(GO) test -race -count 1 -timeout 15m ./...
	$(MAKE) --no-print-directory fuzz

fuzz: ## every fuzz target for FUZZTIME
	GO='$(GO)' FUZZTIME='$(FUZZTIME)' hack/fuzz

# The servers that users run beside the one that is linked: those of Debian 12 and 13, and the 3.6 of upstream. The short form has the first.
bin/etcd-3.4:
	hack/etcd bookworm 3.4 $@

bin/etcd-3.5:
	hack/etcd trixie 3.5 $@

bin/etcd-3.6: test/etcd/go.mod test/etcd/go.sum
	CGO_ENABLED=0 $(GO) build -C test/etcd -trimpath -o ../../$@ go.etcd.io/etcd/server/v3

# WireGuard in user space, for kernels that have none.
bin/wireguard-go: test/wireguard/go.mod test/wireguard/go.sum
	CGO_ENABLED=0 $(GO) build -C test/wireguard -trimpath -ldflags '-s -w' -o ../../$@ golang.zx2c4.com/wireguard

# kube-apiserver and others in one: minutes to compile the first time. The flags are those of test/kubernetes/build, which shares
# the cache of the compiler.
bin/kubernetes: test/kubernetes/go.mod test/kubernetes/go.sum test/kubernetes/cmd/kubernetes/main.go
	CGO_ENABLED=0 GOFLAGS= GOWORK=off $(GO) build -C test/kubernetes -buildvcs=false -trimpath -tags no_btrfs,no_zfs,no_devmapper -ldflags '-s -w' \
		-o ../../$@ ./cmd/kubernetes

faults: deps build bin/etcd-3.4 bin/wireguard-go $(if $(SHORT),,bin/etcd-3.5 bin/etcd-3.6 bin/kubernetes) ## the catalogue of faults, each with what it may cost: SHORT=1 for a part of it, ONLY=REGEX
	bin/overlay-lab faults $(if $(SHORT),--short) $(if $(ONLY),--only '$(ONLY)')

soak: deps build ## random faults for MINUTES=10 from SEED, ending in exactly the planned state
	bin/overlay-lab soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: deps build $(if $(QUICK)$(filter-out kube,$(ONLY)),,bin/kubernetes) ## how fast and how small: one table, and test/bench/results/latest.*: QUICK=1 for the counts alone, ONLY=REGEX
	bin/overlay-bench $(if $(QUICK),--quick,--out test/bench/results) $(if $(ONLY),--only '$(ONLY)')

bench-go: deps ## the Go benchmarks, in the form that benchstat reads
	$(GO) test -run '^$$' -bench . -benchmem ./...

image: deps ## bin/overlayd-image-ARCH.tar, for `ctr images import` and `docker load`, and what is in it (SPDX): ARCHES=amd64,arm64 IMAGE=NAME[:TAG]
	$(GO) run -C dist/image . build -arch '$(ARCHES)' -version '$(VERSION)' -name '$(IMAGE)' -go '$(GO)'

test-image: deps ## the image, both architectures, built twice, its programs run
	$(GO) vet -C dist/image ./... && $(GO) test -C dist/image -count 1 -timeout 15m ./...

test-dist: ## Kubernetes manifests and chart, strictly against the API types
	$(GO) vet -C dist/test ./... && $(GO) test -C dist/test -count 1 -timeout 10m ./...

KUBERNETES_TEST = bin/kubernetes-test -go '$(GO)' $(if $(STORE),-store $(STORE)) $(if $(PROXY),-proxy $(PROXY)) \
	-backend $(BACKEND) $(if $(KEEP),-keep)

test-kubernetes: deps ## overlayd on a real Kubernetes of three nodes: STORE=kubernetes|etcd BACKEND=vxlan|host-gw PROXY=iptables|nftables ONLY=REGEX KEEP=1 INGRESS=1
	$(GO) test -C test/kubernetes ./build ./conformance ./rows
	$(GO) build -C test/kubernetes -o ../../bin/kubernetes-test ./cmd/kubernetes-test
	$(KUBERNETES_TEST) $(if $(INGRESS),-ingress) $(if $(ONLY),-only '$(ONLY)')

conformance: deps ## Kubernetes' own tests of the network on that cluster: STORE, BACKEND, PROXY and KEEP as above, FOCUS=REGEX SKIP=REGEX
	command -v mmdebstrap >/dev/null || apt-get install -y --no-install-recommends mmdebstrap
	$(GO) build -C test/kubernetes -o ../../bin/kubernetes-test ./cmd/kubernetes-test
	$(KUBERNETES_TEST) -conformance $(if $(FOCUS),-focus '$(FOCUS)') $(if $(SKIP),-skip '$(SKIP)')

lint: bin/golangci-lint ## golangci-lint, with the rules on who may import whom
	bin/golangci-lint run ./...
	bin/golangci-lint fmt --diff ./...
	cd dist/image && ../../bin/golangci-lint run -c ../../.golangci.yml ./...
	cd dist/test && ../../bin/golangci-lint run -c ../../.golangci.yml ./...
	cd test/kubernetes && ../../bin/golangci-lint run -c ../../.golangci.yml ./build/... ./cluster/... ./conformance ./deploy/... ./nodes/... ./rows/... ./cmd/kubernetes-test

bin/golangci-lint: hack/lint/go.mod hack/lint/go.sum
	$(GO) build -C hack/lint -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint

check: lint test demo ## what CI runs

clean: ## remove what was built
	rm -rf bin

deps: # Debian packages that the tests and the lab use
	@hack/deps
