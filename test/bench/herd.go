package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

const herdPrefix = "/herd"

// herd measures the store's side of many nodes that start together, and of some of them that start again. The managers of all of them
// run in one process, against an etcd in another one.
func herd(ctx context.Context, e *Env) error {
	s, err := newSite(ctx, e)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	if _, err := s.cli.Put(ctx, herdPrefix+"/config", siteNetwork); err != nil {
		return err
	}
	o := herdOptions{
		Endpoint: s.lab.Etcd().LocalURL(), Prefix: herdPrefix,
		Nodes: pick(e, 5000, 200), Restarts: pick(e, 500, 100),
		Quiet: pick(e, 10*time.Second, 2*time.Second), Renewals: pick(e, 5*time.Second, 2*time.Second),
	}
	r, err := s.runHerd(ctx, o)
	if err != nil {
		return err
	}
	resp, err := s.cli.Get(ctx, herdPrefix+"/subnets/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	var leases []*subnet.Entry
	for _, kv := range resp.Kvs {
		leases = append(leases, subnet.ParseEntry(string(kv.Key[len(herdPrefix+"/subnets/"):]), kv.Value, kv.ModRevision, kv.CreateRevision, kv.Lease))
	}
	etcdPeak, err := peakOf(s.lab.Etcd().PID())
	if err != nil {
		return err
	}
	e.Add(herdRows(o, r, leases, etcdPeak)...)
	return nil
}

// runHerd runs the managers beside etcd, in its namespace.
func (s *site) runHerd(ctx context.Context, o herdOptions) (herdReport, error) {
	self, err := os.Executable()
	if err != nil {
		return herdReport{}, err
	}
	in, err := json.Marshal(o)
	if err != nil {
		return herdReport{}, err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, self, HerdCommand)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, os.Stderr
	if err := s.lab.Etcd().Do(cmd.Start); err != nil {
		return herdReport{}, err
	}
	if err := cmd.Wait(); err != nil {
		return herdReport{}, fmt.Errorf("the process of %d managers: %w", o.Nodes, err)
	}
	var r herdReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return herdReport{}, fmt.Errorf("what the process of %d managers said: %w", o.Nodes, err)
	}
	// The kernel counts it in kilobytes.
	r.Peak = float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) * 1024
	return r, nil
}

// peakOf is the most memory that a process ever had, in bytes.
func peakOf(pid int) (kilobytes float64, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), "VmHWM:")
	_, err = fmt.Sscan(rest, &kilobytes)
	return kilobytes * 1024, err
}

func herdRows(o herdOptions, r herdReport, leases []*subnet.Entry, etcdPeak float64) []Row {
	n := float64(o.Nodes)
	all := fmt.Sprintf("%s nodes at once: ", thousands(strconv.Itoa(o.Nodes)))
	some := fmt.Sprintf("%d of them again: ", o.Restarts)
	row := func(name string, unit Unit, value float64, bound Bound, note string) Row {
		return Row{Group: "herd", Name: name, Unit: unit, Ours: []float64{value}, Bound: bound, Note: note}
	}
	renewals := row(some+"renewals in the busiest tenth of their time", Count, float64(r.BusiestTenth), RatioAtMost(2.5),
		fmt.Sprintf("Measured with a TTL of %v: an etcd lease that is found on a key is renewed somewhere in the first quarter of it.", 4*o.Renewals))
	renewals.Base, renewals.BaseName, renewals.Clock = []float64{float64(o.Restarts) / 10}, "spread evenly", true
	return []Row{
		row(all+"each has a lease", Millis, millis(r.Held), Bound{}, ""),
		row(all+"each knows all", Millis, millis(r.Known), Bound{},
			"Of one machine that does all nodes' work at once: each is told of each, by an etcd on the same cores. The managers share what "+
				"they read (Options.Parse), without which the tables would not fit into memory."),
		row(all+"without a lease of their own", Count, n-float64(owners(leases)), AtMost(0), "By what stands in etcd at the end."),
		row(all+"leases that overlap another", Count, float64(overlaps(leases)), AtMost(0), "By what stands in etcd at the end."),
		row(all+"requests of each", Count, float64(r.Requests)/n, AtMost(12), fmt.Sprintf("Until each knows all: %v.", r.ByName)),
		row(all+"requests in the busiest second", Count, float64(r.Busiest), AtMost(6*n), "Each needs four at its start, and more where it loses a race."),
		row(fmt.Sprintf("%srequests of each in %v after that", all, o.Quiet), Count, float64(r.QuietRequests)/n, AtMost(0.5),
			"They probe the store about once a minute, for the first time 45 to 75 s after their start."),
		row(fmt.Sprintf("%swrites in %v after that", all, o.Quiet), Count, float64(r.QuietWrites), AtMost(0), ""),
		row(some+"news for the others", Count, float64(r.RestartEvents), AtMost(0), "By a watch on all keys."),
		row(some+"writes", Count, float64(r.RestartWrites), AtMost(0), "By etcd's revision."),
		row(some+"requests of each", Count, float64(r.RestartRequests)/float64(o.Restarts), AtMost(12), "The first renewal among them."),
		renewals,
		row(all+"memory of all nodes and etcd", MB, (r.Peak+etcdPeak)/1e6, AtMost(8000), ""),
	}
}

// owners counts the nodes that have a lease that makes sense.
func owners(leases []*subnet.Entry) int {
	ids := map[subnet.Identity]bool{}
	for _, l := range leases {
		if l.Err == nil {
			ids[l.Identity] = true
		}
	}
	return len(ids)
}

// overlaps counts the leases that share addresses with one that stands before them in the order of the addresses.
func overlaps(leases []*subnet.Entry) int {
	count := 0
	for _, f := range addr.Families() {
		var all []netip.Prefix
		for _, l := range leases {
			if p := l.Subnets.Get(f); p.IsValid() {
				all = append(all, p)
			}
		}
		slices.SortFunc(all, addr.ComparePrefix)
		for i := 1; i < len(all); i++ { // prefixes are disjoint or nested
			if all[i].Overlaps(all[i-1]) {
				count++
				all[i] = all[i-1] // the wider one, for those that follow
			}
		}
	}
	return count
}
