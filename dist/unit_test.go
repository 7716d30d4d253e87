package dist_test

import (
	"flag"
	"os/exec"
	"regexp"
	"strconv"
	"testing"
)

// The unit takes from the daemon what it does not need: systemd's own figure for that (0: nothing is left to it, 10: all
// is) does not get worse. It leaves root, NET_ADMIN, netlink, sockets, and writable settings of the kernel.
func TestUnitExposure(t *testing.T) {
	const most = 2.4
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "systemd/overlayd.service").CombinedOutput()
	if err != nil && *withoutSystemd {
		t.Skip("no systemd-analyze, and -without-systemd is given")
	}
	m := regexp.MustCompile(`Overall exposure level for overlayd.service: ([0-9.]+)`).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("systemd-analyze, of Debian's package systemd: %v: %s", err, out)
	}
	if got, err := strconv.ParseFloat(string(m[1]), 64); err != nil || got > most {
		t.Errorf("exposure %s, at most %v is expected:\n%s", m[1], most, out)
	}
}

var withoutSystemd = flag.Bool("without-systemd", false, "skip what systemd-analyze says of the unit, where it is missing")
