package metrics

import (
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/overlayd/overlayd/diag/status"
)

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

// emit gives one sample; the labels' values are in the order of their names.
type emit func(value float64, labels ...string)

// reading is what a metric is read from.
type reading struct {
	*status.Node
	silent bool // the loop gave no answer
}

// metric is one that follows from the status.
type metric struct {
	name   string
	kind   prometheus.ValueType
	labels []string
	help   string
	always bool // there is something to tell without an answer of the loop
	read   func(n reading, give emit)
}

// table lists every metric that follows from the status. Documentation/metrics.md is held against it by a test.
func table() []metric {
	out := []metric{}
	for _, part := range [][]metric{nodeMetrics(), leaseMetrics(), etcdMetrics(), networkMetrics(), peerMetrics(), kernelMetrics(), probeMetrics(), worstMetrics()} {
		out = append(out, part...)
	}
	return out
}

func nodeMetrics() []metric {
	return []metric{
		{"overlayd_build_info", gauge, []string{"version", "goversion"}, "1; labels: version of overlayd and of Go.", true, func(n reading, give emit) {
			give(1, n.Version, runtime.Version())
		}},
		{"overlayd_loop_responsive", gauge, nil, "1 if the daemon's main loop answered this scrape within two seconds. If 0, only this metric, overlayd_build_info, the histograms and the process metrics are present.", true, func(n reading, give emit) {
			give(oneIf(!n.silent))
		}},
		{"overlayd_node_info", gauge, []string{"node", "backend", "firewall"}, "1; labels: node name, network backend, firewall driver.", false, func(n reading, give emit) {
			give(1, n.Name, n.Network.Backend, n.Firewall.Kind)
		}},
		{"overlayd_ready", gauge, nil, "1 if the node is ready for pods, as in /readyz.", false, func(n reading, give emit) {
			give(oneIf(n.Ready))
		}},
		{"overlayd_problem", gauge, []string{"name", "fatal"}, "1 for each failed condition, by name; fatal is true if it makes the node not ready.", false, func(n reading, give emit) {
			for _, p := range n.Problems {
				give(1, p.Name, strconv.FormatBool(p.Fatal))
			}
		}},
		{"overlayd_restart_needed", gauge, nil, "1 if a change takes effect only after a restart of the daemon.", false, func(n reading, give emit) {
			give(oneIf(len(n.Restart) > 0))
		}},
		{"overlayd_interface_changes_total", counter, nil, "Changes of the external interface or its address.", false, func(n reading, give emit) {
			give(float64(n.Changes.Interface))
		}},
		{"overlayd_mtu_changes_total", counter, nil, "Changes of the pod MTU.", false, func(n reading, give emit) {
			give(float64(n.Changes.MTU))
		}},
	}
}

func leaseMetrics() []metric {
	return []metric{
		{"overlayd_lease_held", gauge, nil, "1 if the node holds its lease, confirmed by etcd; 0 if it has none, or only a persisted one.", false, func(n reading, give emit) {
			give(oneIf(n.Lease.Held))
		}},
		{"overlayd_lease_reserved", gauge, nil, "1 if the node's subnet is a reservation, which never expires.", false, func(n reading, give emit) {
			give(oneIf(n.Lease.Reserved))
		}},
		{"overlayd_lease_losses_total", counter, nil, "Times that the node's lease disappeared from etcd and had to be acquired again.", false, func(n reading, give emit) {
			give(float64(n.Lease.Losses))
		}},
		{"overlayd_lease_expiry_timestamp_seconds", gauge, nil, "Unix time at which the node's lease expires unless renewed. Absent if it never expires, or if that is unknown.", false, func(n reading, give emit) {
			giveTime(give, n.Lease.Expires)
		}},
	}
}

func etcdMetrics() []metric {
	return []metric{
		{"overlayd_etcd_reachable", gauge, nil, "1 if etcd is reachable; 0 while requests or the watch fail.", false, func(n reading, give emit) {
			give(oneIf(n.Store.Error == ""))
		}},
		{"overlayd_etcd_data_losses_total", counter, nil, "Times that etcd lost data or was restored from a backup.", false, func(n reading, give emit) {
			give(float64(n.Store.Losses))
		}},
		{"overlayd_etcd_requests_total", counter, []string{"method"}, "Requests to etcd by gRPC method; a stream counts once.", false, func(n reading, give emit) {
			each(n.Store.Requests, give)
		}},
		{"overlayd_etcd_table_revision", gauge, nil, "Revision of the lease table in use; 0 before the first one is read.", false, func(n reading, give emit) {
			give(float64(n.Store.Revision))
		}},
		{"overlayd_etcd_newest_revision", gauge, nil, "Newest revision reported by etcd, for any key.", false, func(n reading, give emit) {
			give(float64(n.Store.Newest))
		}},
		{"overlayd_etcd_revision_lag", gauge, nil, "Revisions by which the lease table is behind the newest one. Other users of the same etcd can make it large; it matters only if it stays large while the table's revision does not change.", false, func(n reading, give emit) {
			give(float64(max(0, n.Store.Newest-n.Store.Revision)))
		}},
		{"overlayd_leases", gauge, nil, "Leases in the table, including this node's.", false, func(n reading, give emit) {
			give(float64(n.Store.Entries))
		}},
	}
}

func networkMetrics() []metric {
	return []metric{
		{"overlayd_pool_subnets", gauge, []string{"network"}, "Subnets of a network that nodes can lease.", false, func(n reading, give emit) {
			for _, p := range n.Network.Pools {
				give(float64(p.Subnets), p.Network)
			}
		}},
		{"overlayd_pool_subnets_leased", gauge, []string{"network"}, "Leased subnets of a network, including those of rejected leases.", false, func(n reading, give emit) {
			for _, p := range n.Network.Pools {
				give(float64(p.Leased), p.Network)
			}
		}},
		{"overlayd_pod_mtu_bytes", gauge, nil, "Pod MTU. Absent before there is a network config.", false, func(n reading, give emit) {
			if n.Network.MTU > 0 {
				give(float64(n.Network.MTU))
			}
		}},
		{"overlayd_device_mtu_bytes", gauge, []string{"device"}, "MTU of a tunnel device.", false, func(n reading, give emit) {
			for _, d := range n.Devices {
				give(float64(d.MTU), d.Name)
			}
		}},
		{"overlayd_device_offload_enabled", gauge, []string{"device", "feature"}, "1 if an offload of a tunnel device is on, 0 if it is off, by ethtool feature name.", false, func(n reading, give emit) {
			for _, d := range n.Devices {
				on := map[string]int{}
				for feature, is := range d.Offloads {
					on[feature] = int(oneIf(is))
				}
				each(on, func(v float64, labels ...string) { give(v, d.Name, labels[0]) })
			}
		}},
	}
}

func peerMetrics() []metric {
	return []metric{
		{"overlayd_peers", gauge, []string{"path"}, "Peers by path: tunnel, direct, unreachable.", false, func(n reading, give emit) {
			give(float64(n.Peers.Tunnel), "tunnel")
			give(float64(n.Peers.Direct), "direct")
			give(float64(n.Peers.Unreachable), "unreachable")
		}},
		{"overlayd_peers_lingering", gauge, nil, "Peers whose leases are gone and that are kept briefly.", false, func(n reading, give emit) {
			give(float64(n.Peers.Lingering))
		}},
		{"overlayd_leases_rejected", gauge, []string{"cause"}, "Rejected leases of other nodes, by cause: invalid, backend, subnet, overlap, public-ip, vtep, other. This node sends nothing to them.", false, func(n reading, give emit) {
			by, rest := map[string]int{others: 0}, n.Peers.Refused
			for cause, count := range n.Peers.RefusedBy {
				by[cause] += count
				rest -= count
			}
			by[others] += max(0, rest)
			each(by, give)
		}},
	}
}

func kernelMetrics() []metric {
	return []metric{
		{"overlayd_reconcile_rounds_total", counter, nil, "Reconciliations of the main loop.", false, func(n reading, give emit) {
			give(float64(n.Reconcile.Rounds))
		}},
		{"overlayd_reconcile_last_timestamp_seconds", gauge, nil, "Unix time of the last reconciliation. Absent before the first one.", false, func(n reading, give emit) {
			giveTime(give, n.Reconcile.Last)
		}},
		{"overlayd_kernel_last_resync_timestamp_seconds", gauge, nil, "Unix time of the last full resync with the kernel. Absent before the first one.", false, func(n reading, give emit) {
			giveTime(give, n.Reconcile.Looked)
		}},
		{"overlayd_kernel_refused_objects", gauge, nil, "Objects that the kernel refused in the last reconciliation. They are retried.", false, func(n reading, give emit) {
			give(float64(n.Reconcile.Failures))
		}},
		{"overlayd_kernel_entries", gauge, []string{"kind"}, "Desired kernel objects, by kind.", false, func(n reading, give emit) {
			each(counts(n.Entries), give)
		}},
		{"overlayd_drift_reverted_total", counter, []string{"kind"}, "External changes that were reverted, by kind of object.", false, func(n reading, give emit) {
			by := counts(n.Entries)
			zero(by) // so that the first repair is an increase, and not a new series
			for _, d := range n.Drift {
				by[d.Kind] += d.Count
			}
			each(by, give)
		}},
		{"overlayd_firewall_runs_total", counter, nil, "Reconciliations of the firewall rules.", false, func(n reading, give emit) {
			give(float64(n.Firewall.Runs))
		}},
		{"overlayd_firewall_failed_runs_total", counter, nil, "Failed reconciliations of the firewall rules; rules may be missing.", false, func(n reading, give emit) {
			give(float64(n.Firewall.Failed))
		}},
		{"overlayd_firewall_checked_timestamp_seconds", gauge, nil, "Unix time at which the firewall rules were last verified. Absent before the first time.", false, func(n reading, give emit) {
			giveTime(give, n.Firewall.Checked)
		}},
	}
}

func probeMetrics() []metric {
	return []metric{
		{"overlayd_probe_enabled", gauge, nil, "1 if this node pings its peers.", false, func(n reading, give emit) {
			give(oneIf(n.Probe.On))
		}},
		{"overlayd_probe_failing", gauge, nil, "1 if this node cannot send pings at all.", false, func(n reading, give emit) {
			give(oneIf(n.Probe.Error != ""))
		}},
		{"overlayd_probe_targets", gauge, []string{"verdict"}, "Pinged peers, by result of the last pings: answers, lossy, small-only (full-size packets are lost), silent, not-pinged (not yet).", false, func(n reading, give emit) {
			give(float64(n.Probe.Answer), string(status.Answers))
			give(float64(n.Probe.Lossy), string(status.Lossy))
			give(float64(n.Probe.SmallOnly), string(status.SmallOnly))
			give(float64(n.Probe.Silent), string(status.Silent))
			give(float64(n.Probe.NotPinged), "not-pinged")
		}},
		{"overlayd_probe_packets_sent_total", counter, nil, "Pings sent.", false, func(n reading, give emit) {
			give(float64(n.Probe.Sent))
		}},
		{"overlayd_probe_packets_lost_total", counter, nil, "Pings without an answer.", false, func(n reading, give emit) {
			give(float64(n.Probe.Lost))
		}},
		{"overlayd_probe_packets_not_allowed_total", counter, nil, "Pings that this node's kernel refused to send.", false, func(n reading, give emit) {
			give(float64(n.Probe.NotAllowed))
		}},
		{"overlayd_probe_packet_size_bytes", gauge, nil, "Size of a full-size ping, including the IP header. Absent if nothing is pinged.", false, func(n reading, give emit) {
			if n.Probe.Size > 0 {
				give(float64(n.Probe.Size))
			}
		}},
		{"overlayd_probe_round_seconds", gauge, nil, "Time in which every peer is pinged once. Absent if nothing is pinged.", false, func(n reading, give emit) {
			giveDuration(give, n.Probe.Round)
		}},
		{"overlayd_probe_rtt_median_seconds", gauge, nil, "Median round-trip time of the peers that answer. Absent if none does.", false, func(n reading, give emit) {
			giveDuration(give, n.Probe.MedianRTT)
		}},
	}
}

func worstMetrics() []metric {
	return []metric{
		{"overlayd_probe_peer_loss_ratio", gauge, []string{"peer", "address", "size"}, "Fraction (0 to 1) of the last pings to a peer that were lost, of at most eight, by size: small, full. Only for the 20 worst peers.", false, func(n reading, give emit) {
			eachWorst(n, func(p status.Pings, labels ...string) {
				if p.Sent > 0 {
					give(float64(p.Lost)/float64(p.Sent), labels...)
				}
			})
		}},
		{"overlayd_probe_peer_rtt_seconds", gauge, []string{"peer", "address", "size"}, "Round-trip time of the last ping that a peer answered, by size: small, full. Only for the 20 worst peers.", false, func(n reading, give emit) {
			eachWorst(n, func(p status.Pings, labels ...string) {
				giveDuration(func(v float64, _ ...string) { give(v, labels...) }, p.RTT)
			})
		}},
	}
}

// eachWorst goes over the pings of the worst peers. It holds the bound itself: these are the only labels that others choose.
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

// giveTime gives a time that is known.
func giveTime(give emit, t time.Time) {
	if !t.IsZero() {
		give(float64(t.UnixMilli()) / 1000)
	}
}

// giveDuration gives a duration that is known.
func giveDuration(give emit, d time.Duration) {
	if d > 0 {
		give(d.Seconds())
	}
}

func counts(kinds []status.KindCount) map[string]int {
	out := map[string]int{}
	for _, k := range kinds {
		out[k.Kind] += k.Count
	}
	return out
}

// zero keeps the keys and makes the values zero.
func zero(m map[string]int) {
	for k := range m {
		m[k] = 0
	}
}
