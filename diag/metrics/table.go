package metrics

import (
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/overlayd/overlayd/diag/status"
)

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

// emit adds one sample; label values are in the order of metric.labels.
type emit func(value float64, labels ...string)

// reading is what a metric is read from.
type reading struct {
	*status.Node
	silent bool // the loop did not answer
}

// metric is one that is derived from the status.
type metric struct {
	name   string
	kind   prometheus.ValueType
	labels []string
	help   string
	read   func(n reading, give emit)
}

func define(name string, kind prometheus.ValueType, labels []string, help string, read func(reading, emit)) metric {
	return metric{name, kind, labels, help, read}
}

// table lists every metric that is derived from the status. A test compares it with Documentation/metrics.md.
func table() []metric {
	return slices.Concat(aliveMetrics(), nodeMetrics(), leaseMetrics(), storeMetrics(), networkMetrics(), peerMetrics(),
		kernelMetrics(), probeMetrics(), worstMetrics())
}

// aliveMetrics are served even if the loop does not answer.
func aliveMetrics() []metric {
	return []metric{
		define("overlayd_build_info", gauge, []string{"version", "goversion"},
			"1; labels: version of overlayd and of Go.",
			func(n reading, give emit) { give(1, n.Version, runtime.Version()) }),
		define("overlayd_loop_responsive", gauge, nil,
			"1 if the daemon's main loop answered this scrape within two seconds. If 0, most other metrics are absent.",
			func(n reading, give emit) { give(oneIf(!n.silent)) }),
	}
}

func nodeMetrics() []metric {
	return []metric{
		define("overlayd_node_info", gauge, []string{"node", "backend", "firewall"},
			"1; labels: node name, network backend, firewall driver.",
			func(n reading, give emit) { give(1, n.Name, n.Network.Backend, n.Firewall.Kind) }),
		define("overlayd_ready", gauge, nil, "1 if the node is ready for pods, as in /readyz.",
			func(n reading, give emit) { give(oneIf(n.Ready)) }),
		define("overlayd_problem", gauge, []string{"name", "fatal"},
			"1 for each problem; fatal is true if it makes the node not ready.",
			func(n reading, give emit) {
				for _, p := range n.Problems {
					give(1, p.Name, strconv.FormatBool(p.Fatal))
				}
			}),
		define("overlayd_restart_needed", gauge, nil,
			"1 if a change waits for a restart of the daemon.",
			func(n reading, give emit) { give(oneIf(len(n.Restart) > 0)) }),
		define("overlayd_interface_changes_total", counter, nil, "Changes of the external interface or its address.",
			func(n reading, give emit) { give(float64(n.Changes.Interface)) }),
		define("overlayd_mtu_changes_total", counter, nil, "Changes of the pod MTU.",
			func(n reading, give emit) { give(float64(n.Changes.MTU)) }),
	}
}

func leaseMetrics() []metric {
	return []metric{
		define("overlayd_lease_held", gauge, nil,
			"1 if the store confirmed the node's lease.",
			func(n reading, give emit) { give(oneIf(n.Lease.Held)) }),
		define("overlayd_lease_reserved", gauge, nil, "1 if the node's subnet is a reservation, which never expires.",
			func(n reading, give emit) { give(oneIf(n.Lease.Reserved)) }),
		define("overlayd_lease_losses_total", counter, nil,
			"Times that the node's lease disappeared from the store.",
			func(n reading, give emit) { give(float64(n.Lease.Losses)) }),
		define("overlayd_lease_expiry_timestamp_seconds", gauge, nil,
			"Unix time at which the node's lease expires unless renewed.",
			func(n reading, give emit) { giveTime(give, n.Lease.Expires) }),
	}
}

func storeMetrics() []metric {
	return []metric{
		define("overlayd_store_reachable", gauge, nil, "1 if the store (etcd or the Kubernetes API) is reachable, and the watch works.",
			func(n reading, give emit) { give(oneIf(n.Store.Error == "")) }),
		define("overlayd_store_data_losses_total", counter, nil,
			"Times that the store lost data or was restored from a backup.",
			func(n reading, give emit) { give(float64(n.Store.Losses)) }),
		define("overlayd_store_requests_total", counter, []string{"method"},
			"Requests to the store by method; a stream counts once.",
			func(n reading, give emit) { each(n.Store.Requests, give) }),
		define("overlayd_store_table_revision", gauge, nil,
			"Revision of the lease table in use; 0 before the first one is read.",
			func(n reading, give emit) { give(float64(n.Store.Revision)) }),
		define("overlayd_store_newest_revision", gauge, nil, "Newest revision reported by the store, for any key.",
			func(n reading, give emit) { give(float64(n.Store.Newest)) }),
		define("overlayd_store_revision_lag", gauge, nil,
			"Revisions by which the lease table is behind the newest one. Harmless while the table's revision moves.",
			func(n reading, give emit) { give(float64(max(0, n.Store.Newest-n.Store.Revision))) }),
		define("overlayd_leases", gauge, nil, "Leases in the table, including this node's.",
			func(n reading, give emit) { give(float64(n.Store.Entries)) }),
	}
}

func networkMetrics() []metric {
	return []metric{
		define("overlayd_pool_subnets", gauge, []string{"network"}, "Subnets of a network that nodes can lease.",
			func(n reading, give emit) {
				for _, p := range n.Network.Pools {
					give(float64(p.Subnets), p.Network)
				}
			}),
		define("overlayd_pool_subnets_leased", gauge, []string{"network"},
			"Leased subnets of a network, including those of rejected leases.",
			func(n reading, give emit) {
				for _, p := range n.Network.Pools {
					give(float64(p.Leased), p.Network)
				}
			}),
		define("overlayd_pod_mtu_bytes", gauge, nil, "Pod MTU.",
			func(n reading, give emit) {
				if n.Network.MTU > 0 {
					give(float64(n.Network.MTU))
				}
			}),
		define("overlayd_device_mtu_bytes", gauge, []string{"device"}, "MTU of a tunnel device.",
			func(n reading, give emit) {
				for _, d := range n.Devices {
					give(float64(d.MTU), d.Name)
				}
			}),
		define("overlayd_device_offload_enabled", gauge, []string{"device", "feature"},
			"1 if an offload of a tunnel device is on, by ethtool feature name.",
			func(n reading, give emit) {
				for _, d := range n.Devices {
					on := map[string]int{}
					for feature, is := range d.Offloads {
						on[feature] = int(oneIf(is))
					}
					each(on, func(v float64, labels ...string) { give(v, d.Name, labels[0]) })
				}
			}),
	}
}

func peerMetrics() []metric {
	return []metric{
		define("overlayd_peers", gauge, []string{"path"}, "Peers by path: tunnel, direct, unreachable.",
			func(n reading, give emit) {
				give(float64(n.Peers.Tunnel), "tunnel")
				give(float64(n.Peers.Direct), "direct")
				give(float64(n.Peers.Unreachable), "unreachable")
			}),
		define("overlayd_peers_lingering", gauge, nil, "Peers without a lease that are kept briefly.",
			func(n reading, give emit) { give(float64(n.Peers.Lingering)) }),
		define("overlayd_leases_rejected", gauge, []string{"cause"},
			"Rejected leases of other nodes, by cause: invalid, backend, subnet, overlap, public-ip, shared-ip, vtep, other.",
			func(n reading, give emit) {
				by, rest := map[string]int{others: 0}, n.Peers.Rejected
				for cause, count := range n.Peers.RejectedBy {
					by[cause] += count
					rest -= count
				}
				by[others] += max(0, rest)
				each(by, give)
			}),
	}
}

func kernelMetrics() []metric {
	return []metric{
		define("overlayd_reconcile_rounds_total", counter, nil, "Reconciliations of the main loop.",
			func(n reading, give emit) { give(float64(n.Reconcile.Rounds)) }),
		define("overlayd_reconcile_last_timestamp_seconds", gauge, nil,
			"Unix time of the last reconciliation.",
			func(n reading, give emit) { giveTime(give, n.Reconcile.Last) }),
		define("overlayd_kernel_last_resync_timestamp_seconds", gauge, nil,
			"Unix time of the last full resync with the kernel.",
			func(n reading, give emit) { giveTime(give, n.Reconcile.Resynced) }),
		define("overlayd_kernel_rejected_objects", gauge, nil,
			"Objects that the kernel rejected in the last reconciliation.",
			func(n reading, give emit) { give(float64(n.Reconcile.Failures)) }),
		define("overlayd_kernel_entries", gauge, []string{"kind"}, "Desired kernel objects, by kind.",
			func(n reading, give emit) {
				for _, k := range n.Entries {
					give(float64(k.Count), k.Kind)
				}
			}),
		define("overlayd_drift_reverted_total", counter, []string{"kind"},
			"External changes that were reverted, by kind of object.",
			func(n reading, give emit) {
				by := map[string]int{}
				for _, k := range n.Entries { // so that the first repair is an increase, and not a new series
					by[k.Kind] = 0
				}
				for _, d := range n.Drift {
					by[d.Kind] += d.Count
				}
				each(by, give)
			}),
		define("overlayd_firewall_runs_total", counter, nil, "Reconciliations of the firewall rules.",
			func(n reading, give emit) { give(float64(n.Firewall.Runs)) }),
		define("overlayd_firewall_failed_runs_total", counter, nil,
			"Failed reconciliations of the firewall rules.",
			func(n reading, give emit) { give(float64(n.Firewall.Failed)) }),
		define("overlayd_firewall_checked_timestamp_seconds", gauge, nil,
			"Unix time at which the firewall rules were last verified.",
			func(n reading, give emit) { giveTime(give, n.Firewall.Checked) }),
	}
}

func probeMetrics() []metric {
	return []metric{
		define("overlayd_probe_enabled", gauge, nil, "1 if this node pings its peers.",
			func(n reading, give emit) { give(oneIf(n.Probe.On)) }),
		define("overlayd_probe_failing", gauge, nil, "1 if this node cannot send pings at all.",
			func(n reading, give emit) { give(oneIf(n.Probe.Error != "")) }),
		define("overlayd_probe_targets", gauge, []string{"verdict"},
			"Pinged peers, by result of the last pings: answers, lossy, small-only (full-size packets are lost), "+
				"silent, not-pinged (not yet).",
			func(n reading, give emit) {
				give(float64(n.Probe.Answer), string(status.Answers))
				give(float64(n.Probe.Lossy), string(status.Lossy))
				give(float64(n.Probe.SmallOnly), string(status.SmallOnly))
				give(float64(n.Probe.Silent), string(status.Silent))
				give(float64(n.Probe.NotPinged), "not-pinged")
			}),
		define("overlayd_probe_packets_sent_total", counter, nil, "Pings sent.",
			func(n reading, give emit) { give(float64(n.Probe.Sent)) }),
		define("overlayd_probe_packets_lost_total", counter, nil, "Pings without an answer.",
			func(n reading, give emit) { give(float64(n.Probe.Lost)) }),
		define("overlayd_probe_packets_not_allowed_total", counter, nil,
			"Pings that this node's kernel refused to send.",
			func(n reading, give emit) { give(float64(n.Probe.NotAllowed)) }),
		define("overlayd_probe_packet_size_bytes", gauge, nil,
			"Size of a full-size ping, including the IP header.",
			func(n reading, give emit) {
				if n.Probe.Size > 0 {
					give(float64(n.Probe.Size))
				}
			}),
		define("overlayd_probe_round_seconds", gauge, nil,
			"Time in which every peer is pinged once.",
			func(n reading, give emit) { giveDuration(give, n.Probe.Round) }),
		define("overlayd_probe_rtt_median_seconds", gauge, nil,
			"Median round-trip time of the peers that answer.",
			func(n reading, give emit) { giveDuration(give, n.Probe.MedianRTT) }),
	}
}

func worstMetrics() []metric {
	return []metric{
		define("overlayd_probe_peer_loss_ratio", gauge, []string{"peer", "address", "size"},
			"Lost fraction (0 to 1) of the last pings to a peer, at most eight, by size: small, full. 20 worst peers.",
			func(n reading, give emit) {
				eachWorst(n, func(p status.Pings, labels ...string) {
					if p.Sent > 0 {
						give(float64(p.Lost)/float64(p.Sent), labels...)
					}
				})
			}),
		define("overlayd_probe_peer_rtt_seconds", gauge, []string{"peer", "address", "size"},
			"Round-trip time of the last ping that a peer answered, by size: small, full. 20 worst peers.",
			func(n reading, give emit) {
				eachWorst(n, func(p status.Pings, labels ...string) {
					giveDuration(func(v float64, _ ...string) { give(v, labels...) }, p.RTT)
				})
			}),
	}
}

// eachWorst iterates over the pings of the worst peers. It enforces the bound itself: only these labels are chosen by
// other nodes.
func eachWorst(n reading, give func(p status.Pings, labels ...string)) {
	for _, p := range n.Probe.Worst[:min(len(n.Probe.Worst), status.WorstPeers)] {
		if p.Probe == nil {
			continue
		}
		give(p.Probe.Small, p.Name, p.Probe.Address, "small")
		give(p.Probe.Full, p.Name, p.Probe.Address, "full")
	}
}

func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// giveTime omits an unknown time.
func giveTime(give emit, t time.Time) {
	if !t.IsZero() {
		give(float64(t.UnixMilli()) / 1000)
	}
}

// giveDuration omits an unknown duration.
func giveDuration(give emit, d time.Duration) {
	if d > 0 {
		give(d.Seconds())
	}
}
