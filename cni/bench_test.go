package cni_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkAdd holds ADD through overlay-cni against the same delegate started directly with the same configuration, in
// turns. It reports both medians and the difference between them, in milliseconds: what the plugin itself costs a pod.
func BenchmarkAdd(b *testing.B) {
	n := newNode(b)
	n.env(envV4)
	bin := programs(b)
	own := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"pods","type":"overlay-cni","subnetFile":%q,"dataDir":%q,"ipam":{"dataDir":%q}}`,
		filepath.Join(n.dir, "subnet.env"), filepath.Join(n.dir, "kept"), filepath.Join(n.dir, "ips"))
	direct, err := generate(own, envV4)
	if err != nil {
		b.Fatal(err)
	}
	p := newPod(b, "")
	run := func(plugin, command, container, stdin string) (took time.Duration) {
		b.Helper()
		n.Do(func() {
			cmd := exec.Command(filepath.Join(bin, plugin))
			cmd.Env = append(os.Environ(), "CNI_PATH="+bin, "CNI_COMMAND="+command, "CNI_CONTAINERID="+container,
				"CNI_IFNAME=eth0", "CNI_NETNS="+p.rt.NetNS)
			cmd.Stdin = strings.NewReader(stdin)
			start := time.Now()
			out, err := cmd.Output()
			took = time.Since(start)
			if err != nil || (command == "ADD" && !json.Valid(out)) {
				b.Fatalf("%s %s: %v\n%s", plugin, command, err, out)
			}
		})
		return took
	}
	kinds := []struct{ plugin, conf string }{{"overlay-cni", own}, {"bridge", string(direct.Conf)}}
	took := make([][]time.Duration, len(kinds))
	run("overlay-cni", "ADD", "first", own) // makes the bridge
	run("overlay-cni", "DEL", "first", own)
	for i := 0; b.Loop(); i++ {
		for k := range kinds {
			kind := (i + k) % len(kinds)
			container := fmt.Sprintf("c%d-%d", i, kind)
			took[kind] = append(took[kind], run(kinds[kind].plugin, "ADD", container, kinds[kind].conf))
			run(kinds[kind].plugin, "DEL", container, kinds[kind].conf)
		}
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return all[len(all)/2].Seconds() * 1000
	}
	through, without := median(took[0]), median(took[1])
	b.ReportMetric(through, "ms-through")
	b.ReportMetric(without, "ms-direct")
	b.ReportMetric(through-without, "ms-more")
}

// BenchmarkStart is what one process of the plugin costs: its start, and the shortest answer.
func BenchmarkStart(b *testing.B) {
	program := filepath.Join(programs(b), "overlay-cni")
	info, err := os.Stat(program)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		cmd := exec.Command(program)
		cmd.Env = []string{"CNI_COMMAND=VERSION"}
		if out, err := cmd.Output(); err != nil || !json.Valid(out) {
			b.Fatalf("%v\n%s", err, out)
		}
	}
	b.ReportMetric(float64(info.Size())/1e6, "MB")
}
