package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// SystemFacts is what files say of the node.
type SystemFacts struct {
	Sysctls map[string]string // by their path below /proc/sys; one that the kernel does not have is missing

	MachineID    string // "": there is none
	SubnetEnv    map[string]string
	SubnetEnvErr error
	Dirs         []dirFacts

	Sockets        []udpSocket
	Managers       []managerFacts // by managers(), or none
	Firewalld, UFW bool           // installed and on
}

// udpSocket is a socket of a program, or of the kernel (without an inode).
type udpSocket struct {
	port  uint16
	inode string
	v6    bool
	any   bool // of IPv6: it has no address of its own, and may take IPv4 as well
}

// blocks reports whether a program has the port that a tunnel device needs. One that is up has it.
func (s udpSocket) blocks(d tunnel) bool {
	return s.port == d.port && s.inode != "0" && (!d.exists || !d.link.Up) && (s.v6 == (d.family == addr.IPv6) || s.any)
}

// readSystem reads what checks ask for. The settings are those of the network namespace of the calling thread.
func readSystem(r root, s netstate.Survey, bridges []netstate.PodBridge) SystemFacts {
	f := SystemFacts{Sysctls: readSysctls(r, s), Sockets: readSockets(r)}
	f.MachineID, _ = r.read("etc/machine-id")
	for _, m := range managers() {
		f.Managers = append(f.Managers, m.read(r, bridges))
	}
	f.Firewalld = r.exists("run/firewalld") || r.exists("run/firewalld.pid")
	conf, _ := r.read("etc/ufw/ufw.conf")
	f.UFW = slices.Contains(strings.Fields(strings.ToUpper(conf)), "ENABLED=YES")
	return f
}

// Settings of the kernel, by their path below /proc/sys.
const (
	connections    = "net/netfilter/nf_conntrack_count"
	maxConnections = "net/netfilter/nf_conntrack_max"
)

func ipv6Off(device string) string          { return "net/ipv6/conf/" + device + "/disable_ipv6" }
func rpFilter(device string) string         { return "net/ipv4/conf/" + device + "/rp_filter" }
func deviceForwarding(device string) string { return "net/ipv4/conf/" + device + "/forwarding" }

// ignoresPings is the setting by which a node answers no pings.
func ignoresPings(fam addr.Family) string {
	return map[addr.Family]string{
		addr.IPv4: "net/ipv4/icmp_echo_ignore_all", addr.IPv6: "net/ipv6/icmp/echo_ignore_all",
	}[fam]
}

func threshold(f addr.Family, n int) string {
	return fmt.Sprintf("net/ipv%d/neigh/default/gc_thresh%d", uint8(f), n)
}

func readSysctls(r root, s netstate.Survey) map[string]string {
	paths := []string{connections, maxConnections, rpFilter("all"), ipv6Off("default")}
	for _, fam := range addr.Families() {
		paths = append(paths, netstate.Forwarding(fam).Path, netstate.BridgeNetfilter(fam).Path, ignoresPings(fam),
			threshold(fam, 1), threshold(fam, 2), threshold(fam, 3))
	}
	for _, l := range s.Links {
		if l.Kind != "veth" || l.Master == "" { // a port of a bridge routes nothing
			paths = append(paths, rpFilter(l.Name), deviceForwarding(l.Name), ipv6Off(l.Name))
		}
	}
	out := map[string]string{}
	for _, p := range paths {
		if v, ok := r.read("proc/sys/" + p); ok {
			out[p] = v
		}
	}
	return out
}

// number is a setting as a number; false where it is not known.
func (f SystemFacts) number(path string) (int, bool) {
	n, err := strconv.Atoi(f.Sysctls[path])
	return n, err == nil
}

// readSockets reads /proc/net/udp and udp6: sl, local_address (hexadecimal ADDRESS:PORT), ..., the inode as the tenth.
func readSockets(r root) []udpSocket {
	var out []udpSocket
	for i, file := range []string{"proc/thread-self/net/udp", "proc/thread-self/net/udp6"} {
		text, _ := r.read(file)
		for line := range strings.Lines(text) {
			words := strings.Fields(line)
			if len(words) < 10 {
				continue
			}
			at, hex, _ := strings.Cut(words[1], ":")
			if port, err := strconv.ParseUint(hex, 16, 16); err == nil {
				s := udpSocket{port: uint16(port), inode: words[9], v6: i == 1}
				s.any = s.v6 && strings.Trim(at, "0") == ""
				out = append(out, s)
			}
		}
	}
	return out
}

// processes are the directories of all processes.
func (r root) processes() []string {
	dirs, _ := filepath.Glob(r.path("proc/[0-9]*"))
	return dirs
}

// runs finds a process by its name, of which the kernel keeps 15 characters.
func runs(r root, comm string) bool {
	return slices.ContainsFunc(r.processes(), func(dir string) bool {
		name, _ := os.ReadFile(dir + "/comm")
		return strings.TrimSpace(string(name)) == comm
	})
}

// manager is a program that configures devices by itself.
type manager struct {
	name    string
	running string // exists while it runs, and maybe after
	process string // its name; "": that it runs is known without
	files   []dropIn
	look    string // shows what it does
	reload  string
}

// dropIn is a file that tells a manager to leave overlayd's devices alone.
type dropIn struct {
	name  string
	globs []string       // where it, or another like it, may be
	tells *regexp.Regexp // what such a file says
	may   string         // what the program may do without
}

// managers are the programs that are known to take away what overlayd or a CNI plugin has configured.
func managers() []manager {
	networkd := []string{"etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd", "lib/systemd"}
	in := func(pattern string) (globs []string) {
		for _, dir := range networkd {
			globs = append(globs, dir+"/"+pattern)
		}
		return globs
	}
	return []manager{
		{
			"systemd-networkd", "run/systemd/netif/state", "systemd-network", []dropIn{{
				"/etc/systemd/network/10-overlayd.network", in("network/*.network"),
				regexp.MustCompile(`(?ms)^Name=.*overlay.*^Unmanaged=(yes|true|on|1)`),
				"may change addresses, routes and ports of devices that one of its files matches",
			}, {
				"/etc/systemd/networkd.conf.d/overlayd.conf", append(in("networkd.conf.d/*.conf"), in("networkd.conf")...),
				regexp.MustCompile(`(?m)^ManageForeignRout(es|ingPolicyRules)=(no|false|off|0)(?s:.*)` +
					`^ManageForeignRout(es|ingPolicyRules)=(no|false|off|0)`),
				"removes foreign routes and rules when it starts or reconfigures a device",
			}}, "networkctl", "networkctl reload, and for the routes its next start",
		},
		{
			"NetworkManager", "run/NetworkManager", "NetworkManager", []dropIn{{
				"/etc/NetworkManager/conf.d/overlayd.conf",
				[]string{
					"etc/NetworkManager/*.conf", "etc/NetworkManager/conf.d/*.conf",
					"usr/lib/NetworkManager/conf.d/*.conf", "run/NetworkManager/conf.d/*.conf",
				},
				regexp.MustCompile(`(?s)(managed.*interface-name:overlay|interface-name:overlay.*managed=0)`),
				"may remove addresses and ports, as with `nmcli networking off`",
			}}, "nmcli device status", "nmcli general reload",
		},
		{
			"udev", "run/udev/control", "", []dropIn{{
				"/etc/systemd/network/10-overlayd.link", in("network/*.link"),
				regexp.MustCompile(`(?ms)^OriginalName=.*overlay.*^MACAddressPolicy=none`),
				"may change the MAC address that the lease announces",
			}}, "udevadm test-builtin net_setup_link /sys/class/net/DEVICE", "udevadm control --reload",
		},
	}
}

// managerFacts is what a manager does here.
type managerFacts struct {
	runs    bool
	told    []bool   // by each of its files, or another like it
	bridges []string // of the pods, which no file names
}

func (m manager) read(r root, bridges []netstate.PodBridge) managerFacts {
	x := managerFacts{runs: r.exists(m.running) && (m.process == "" || runs(r, m.process))}
	all := ""
	for _, f := range m.files {
		told := false
		for _, glob := range f.globs {
			files, _ := filepath.Glob(r.path(glob))
			for _, file := range files {
				b, _ := os.ReadFile(file)
				if f.tells.Match(b) {
					told, all = true, all+string(b)
				}
			}
		}
		x.told = append(x.told, told)
	}
	for _, b := range bridges {
		if !strings.Contains(all, b.Name) {
			x.bridges = append(x.bridges, b.Name)
		}
	}
	return x
}

// support is one thing that the kernel and the system must be able to do.
type support struct {
	what string
	err  error
	fix  string
}

// trySupport tries in a namespace of its own what the kernel and the system must be able to do for this node.
func trySupport(f Facts) []support {
	var out []support
	s := f.Daemon.Status // the zero value where it does not run
	try := func(what string, do func() error, fix string) { out = append(out, support{what, do(), fix}) }
	err := netstate.InTrial(func() {
		if f.backend() == subnet.VXLAN && (len(s.Devices) == 0 || len(f.Survey.Ours.Links) == 0) {
			try("VXLAN devices", func() error { return netstate.TryVXLAN(addr.IPv4) },
				"modprobe vxlan && echo vxlan > /etc/modules-load.d/overlayd.conf")
		}
		if f.backend() == subnet.HostGW || f.Config != nil && f.Config.Backend.DirectRouting {
			try("address sets (ipset)", trySets, "modprobe -a ip_set_hash_ip xt_set && "+
				"printf 'ip_set_hash_ip\\nxt_set\\n' >> /etc/modules-load.d/overlayd.conf")
		}
		if s.Firewall.Checked.IsZero() {
			try("firewall rules (nftables or iptables)", tryFirewall, "apt-get install iptables")
		}
	})
	if err != nil {
		out = append(out, support{what: "test", err: err})
	}
	return out
}

func trySets() error {
	_, err := ipset.New().Ensure("trial", addr.IPv4, false, nil)
	return err
}

// tryFirewall is content with nf_tables, for which the daemon needs no program, or with iptables.
func tryFirewall() error {
	inKernel := packetfilter.TryMasquerade()
	if inKernel == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), runToolFor)
	defer cancel()
	cmd := exec.CommandContext(ctx, "iptables-restore")
	cmd.Stdin = strings.NewReader("*nat\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nf_tables: %w; iptables-restore: %w: %.200s", inKernel, err, out)
	}
	return nil
}

// freeAddress is one that a pod here may have and most likely none has; not valid without a lease.
func (f Facts) freeAddress(fam addr.Family) netip.Addr {
	if own := f.Self.Subnets.Get(fam); own.IsValid() {
		return addr.Last(own).Prev()
	}
	return netip.Addr{}
}
