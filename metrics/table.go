package metrics

import (
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/overlayd/overlayd/status"
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
		{"overlayd_build_info", gauge, []string{"version", "goversion"}, "1; the labels tell what runs.", true, func(n reading, give emit) {
			give(1, n.Version, runtime.Version())
		}},
		{"overlayd_loop_answers", gauge, nil, "1 if the daemon's loop answered this scrape within two seconds. If it is 0, only this one, overlayd_build_info and what is measured as it happens are there.", true, func(n reading, give emit) {
			give(oneIf(!n.silent))
		}},
		{"overlayd_node_info", gauge, []string{"node", "backend", "firewall"}, "1; the labels tell the node's name, the backend of the network and what holds the firewall rules.", false, func(n reading, give emit) {
			give(1, n.Name, n.Network.Backend, n.Firewall.Kind)
		}},
		{"overlayd_ready", gauge, nil, "1 if all that pods need is in place, as /readyz says.", false, func(n reading, give emit) {
			give(oneIf(n.Ready))
		}},
		{"overlayd_problem", gauge, []string{"name", "fatal"}, "1 for each thing that is not as it should be, by its name; fatal is true if the node is not ready because of it.", false, func(n reading, give emit) {
			for _, p := range n.Problems {
				give(1, p.Name, strconv.FormatBool(p.Fatal))
			}
		}},
		{"overlayd_restart_needed", gauge, nil, "1 if something would be otherwise after a restart of the daemon.", false, func(n reading, give emit) {
			give(oneIf(len(n.Restart) > 0))
		}},
		{"overlayd_interface_changes_total", counter, nil, "How often another device or address came to lead to the other nodes.", false, func(n reading, give emit) {
			give(float64(n.Changes.Interface))
		}},
		{"overlayd_mtu_changes_total", counter, nil, "How often the pods' MTU became another one.", false, func(n reading, give emit) {
			give(float64(n.Changes.MTU))
		}},
	}
}

func leaseMetrics() []metric {
	return []metric{
		{"overlayd_lease_held", gauge, nil, "1 if the node holds its lease and etcd says so; 0 if it has none, or remembers it only.", false, func(n reading, give emit) {
			give(oneIf(n.Lease.Held))
		}},
		{"overlayd_lease_reserved", gauge, nil, "1 if the node's subnet is reserved for it, so that its lease never ends.", false, func(n reading, give emit) {
			give(oneIf(n.Lease.Reserved))
		}},
		{"overlayd_lease_losses_total", counter, nil, "How often the node's lease was gone from etcd, and had to be taken again.", false, func(n reading, give emit) {
			give(float64(n.Lease.Losses))
		}},
		{"overlayd_lease_expiry_timestamp_seconds", gauge, nil, "When the node's lease ends unless it is renewed, in Unix time. Absent if it never ends, or if that is not known.", false, func(n reading, give emit) {
			giveTime(give, n.Lease.Expires)
		}},
	}
}

func etcdMetrics() []metric {
	return []metric{
		{"overlayd_etcd_reachable", gauge, nil, "1 if etcd answers as it should; 0 while there is an error.", false, func(n reading, give emit) {
			give(oneIf(n.Store.Error == ""))
		}},
		{"overlayd_etcd_data_losses_total", counter, nil, "How often etcd was found to have lost data, or to have been restored from a backup.", false, func(n reading, give emit) {
			give(float64(n.Store.Losses))
		}},
		{"overlayd_etcd_requests_total", counter, []string{"method"}, "Requests to etcd by gRPC method; a stream counts once.", false, func(n reading, give emit) {
			each(n.Store.Requests, give)
		}},
		{"overlayd_etcd_table_revision", gauge, nil, "The revision of the table of leases that the node works with; 0 if none was read yet.", false, func(n reading, give emit) {
			give(float64(n.Store.Revision))
		}},
		{"overlayd_etcd_newest_revision", gauge, nil, "The newest revision that etcd has told of, be it for a key of somebody else.", false, func(n reading, give emit) {
			give(float64(n.Store.Newest))
		}},
		{"overlayd_etcd_revision_lag", gauge, nil, "By how many revisions the table is behind the newest one. Other users of the same etcd can make it large; that it stays so while the table's revision stands still is what counts.", false, func(n reading, give emit) {
			give(float64(max(0, n.Store.Newest-n.Store.Revision)))
		}},
		{"overlayd_leases", gauge, nil, "Leases in the table, this node's among them.", false, func(n reading, give emit) {
			give(float64(n.Store.Entries))
		}},
	}
}

func networkMetrics() []metric {
	return []metric{
		{"overlayd_pool_subnets", gauge, []string{"network"}, "Subnets of a network that can be leased.", false, func(n reading, give emit) {
			for _, p := range n.Network.Pools {
				give(float64(p.Subnets), p.Network)
			}
		}},
		{"overlayd_pool_subnets_leased", gauge, []string{"network"}, "Subnets of a network that are leased, those of nodes that are refused among them.", false, func(n reading, give emit) {
			for _, p := range n.Network.Pools {
				give(float64(p.Leased), p.Network)
			}
		}},
		{"overlayd_pod_mtu_bytes", gauge, nil, "The MTU of pods. Absent until there is a network config.", false, func(n reading, give emit) {
			if n.Network.MTU > 0 {
				give(float64(n.Network.MTU))
			}
		}},
		{"overlayd_device_mtu_bytes", gauge, []string{"device"}, "The MTU of a tunnel device.", false, func(n reading, give emit) {
			for _, d := range n.Devices {
				give(float64(d.MTU), d.Name)
			}
		}},
		{"overlayd_device_offload_enabled", gauge, []string{"device", "feature"}, "1 if an offload of a tunnel device is on, 0 if it is off, by the feature's name in ethtool.", false, func(n reading, give emit) {
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
		{"overlayd_peers", gauge, []string{"way"}, "Other nodes by the way to them: tunnel, direct, unreachable.", false, func(n reading, give emit) {
			give(float64(n.Peers.Tunnel), "tunnel")
			give(float64(n.Peers.Direct), "direct")
			give(float64(n.Peers.Unreachable), "unreachable")
		}},
		{"overlayd_peers_lingering", gauge, nil, "Other nodes whose leases are gone, and that are kept for a moment.", false, func(n reading, give emit) {
			give(float64(n.Peers.Lingering))
		}},
		{"overlayd_leases_refused", gauge, []string{"cause"}, "Leases of others that are not believed, by cause: nonsense, backend, subnet, overlap, public-ip, vtep, other. Their nodes are not reached.", false, func(n reading, give emit) {
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
		{"overlayd_reconcile_rounds_total", counter, nil, "Rounds of the loop.", false, func(n reading, give emit) {
			give(float64(n.Reconcile.Rounds))
		}},
		{"overlayd_reconcile_last_timestamp_seconds", gauge, nil, "When the last round was, in Unix time. Absent before the first one.", false, func(n reading, give emit) {
			giveTime(give, n.Reconcile.Last)
		}},
		{"overlayd_kernel_looked_timestamp_seconds", gauge, nil, "When the whole kernel was last looked at, in Unix time. Absent before that.", false, func(n reading, give emit) {
			giveTime(give, n.Reconcile.Looked)
		}},
		{"overlayd_kernel_refused_objects", gauge, nil, "Objects that the kernel refused in the last round. They are tried again.", false, func(n reading, give emit) {
			give(float64(n.Reconcile.Failures))
		}},
		{"overlayd_kernel_entries", gauge, []string{"kind"}, "Objects that the node is to have in its kernel, by kind.", false, func(n reading, give emit) {
			each(counts(n.Entries), give)
		}},
		{"overlayd_drift_repaired_total", counter, []string{"kind"}, "What somebody else changed and was put right, by kind of object.", false, func(n reading, give emit) {
			by := counts(n.Entries)
			zero(by) // so that the first repair is an increase, and not a new series
			for _, d := range n.Drift {
				by[d.Kind] += d.Count
			}
			each(by, give)
		}},
		{"overlayd_firewall_runs_total", counter, nil, "How often the firewall rules were looked at.", false, func(n reading, give emit) {
			give(float64(n.Firewall.Runs))
		}},
		{"overlayd_firewall_failed_runs_total", counter, nil, "How often that failed, so that the rules may not be in place.", false, func(n reading, give emit) {
			give(float64(n.Firewall.Failed))
		}},
		{"overlayd_firewall_checked_timestamp_seconds", gauge, nil, "When the firewall rules were last known to be in place, in Unix time. Absent before that.", false, func(n reading, give emit) {
			giveTime(give, n.Firewall.Checked)
		}},
	}
}

func probeMetrics() []metric {
	return []metric{
		{"overlayd_probe_enabled", gauge, nil, "1 if this node pings the others.", false, func(n reading, give emit) {
			give(oneIf(n.Probe.On))
		}},
		{"overlayd_probe_failing", gauge, nil, "1 if this node is to ping the others, and can't ping anybody.", false, func(n reading, give emit) {
			give(oneIf(n.Probe.Error != ""))
		}},
		{"overlayd_probe_targets", gauge, []string{"verdict"}, "Peers that are pinged, by what came of the last pings: answers, lossy, small-only (full-size packets are lost), silent, not-pinged (not yet).", false, func(n reading, give emit) {
			give(float64(n.Probe.Answer), string(status.Answers))
			give(float64(n.Probe.Lossy), string(status.Lossy))
			give(float64(n.Probe.SmallOnly), string(status.SmallOnly))
			give(float64(n.Probe.Silent), string(status.Silent))
			give(float64(n.Probe.NotPinged), "not-pinged")
		}},
		{"overlayd_probe_packets_sent_total", counter, nil, "Pings sent.", false, func(n reading, give emit) {
			give(float64(n.Probe.Sent))
		}},
		{"overlayd_probe_packets_lost_total", counter, nil, "Pings sent that nobody answered.", false, func(n reading, give emit) {
			give(float64(n.Probe.Lost))
		}},
		{"overlayd_probe_packets_not_allowed_total", counter, nil, "Pings that this node's own kernel refused to send.", false, func(n reading, give emit) {
			give(float64(n.Probe.NotAllowed))
		}},
		{"overlayd_probe_packet_size_bytes", gauge, nil, "Size of a full-size ping with its IP header. Absent where nothing is pinged.", false, func(n reading, give emit) {
			if n.Probe.Size > 0 {
				give(float64(n.Probe.Size))
			}
		}},
		{"overlayd_probe_round_seconds", gauge, nil, "How long it takes until every peer has been pinged once. Absent where nothing is pinged.", false, func(n reading, give emit) {
			giveDuration(give, n.Probe.Round)
		}},
		{"overlayd_probe_rtt_median_seconds", gauge, nil, "The median round trip to the peers that answer. Absent if none does.", false, func(n reading, give emit) {
			giveDuration(give, n.Probe.MedianRTT)
		}},
	}
}

func worstMetrics() []metric {
	return []metric{
		{"overlayd_probe_peer_loss_ratio", gauge, []string{"peer", "address", "size"}, "Of the last pings to a peer, at most eight of a size, the share that was lost, from 0 to 1, by size: small, full. Only for the worst peers, at most 20.", false, func(n reading, give emit) {
			eachWorst(n, func(p status.Pings, labels ...string) {
				if p.Sent > 0 {
					give(float64(p.Lost)/float64(p.Sent), labels...)
				}
			})
		}},
		{"overlayd_probe_peer_rtt_seconds", gauge, []string{"peer", "address", "size"}, "Round trip of the last ping that a peer answered, by size: small, full. Only for the worst peers, at most 20.", false, func(n reading, give emit) {
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
