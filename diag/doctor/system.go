package doctor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// SystemFacts is what files say of the node.
type SystemFacts struct {
	Sysctls map[string]string // by their path below /proc/sys; one that the kernel does not have is missing

	MachineID    string
	HasMachineID bool

	SubnetEnv    map[string]string
	SubnetEnvErr error
	StateDirErr  error // why it can't be written to

	Sockets []udpSocket
	// NeighbourTable says how many neighbours there are and how often one was refused, since boot; Known: the kernel tells.
	NeighbourTable struct {
		Known     bool
		Overflows int
	}
	Managers Managers
	Support  []support

	Firewalld, UFW bool // installed and on

	CNI []cniNetwork
}

// cniNetwork is what the plugin host-local remembers of a network of CNI: the addresses that it gave to pods.
type cniNetwork struct {
	dir   string
	given []netip.Addr
}

// within reports whether it is known to have given addresses of this subnet, and no others.
func (n cniNetwork) within(subnet netip.Prefix) bool {
	return len(n.given) > 0 && !slices.ContainsFunc(n.given, func(a netip.Addr) bool { return !subnet.Contains(a) })
}

// Managers are the programs that configure devices by themselves.
type Managers struct {
	Networkd, NetworkManager, Udev bool // it runs

	NetworkFile   string // the .network file by which systemd-networkd configures Managed; "" is none
	Managed       string // one of our devices, the pods' bridge or a port of it
	LinkFile      string // the .link file that udev takes for our device
	MACPolicy     string // that file's
	ForeignRoutes bool   // networkd is told to leave others' routes and rules alone
	NMIgnores     bool   // a file of NetworkManager's names our devices
	NMAnswers     bool   // it says what it does with those of them that are there
	NMManages     string // those that it manages, with commas
}

// support is one thing that the kernel and the system must be able to do.
type support struct {
	what  string
	err   error
	steps []string
}

// udpSocket is a socket of a program, or of the kernel (without an inode).
type udpSocket struct {
	port   uint16
	inode  string
	v6     bool
	any    bool   // of IPv6: it may be one that takes IPv4 as well
	holder string // the program, where it could be found
}

// inTheWayOf reports whether a program has the port that a tunnel device needs. One that is up has it.
func (s udpSocket) inTheWayOf(d tunnel) bool {
	return s.port == d.port && s.inode != "0" && (!d.there || !d.link.Up) && (s.v6 == (d.family == addr.IPv6) || s.any)
}

// lookAtSystem reads what judges ask for. The settings are those of the network namespace of the calling thread.
func lookAtSystem(r root, s netstate.Survey, bridges []netstate.PodBridge) SystemFacts {
	var f SystemFacts
	f.Sysctls = readSysctls(r, s)
	f.MachineID, f.HasMachineID = r.read("etc/machine-id")
	f.Sockets = readSockets(r)
	f.NeighbourTable.Overflows, f.NeighbourTable.Known = tableOverflows(r)
	f.Managers = lookAtManagers(r, managedLike(s, bridges))
	if f.Managers.NetworkManager {
		f.Managers.NMManages, f.Managers.NMAnswers = askNetworkManager(managedLike(s, bridges))
	}
	f.Firewalld = r.exists("run/firewalld") || r.exists("run/firewalld.pid")
	conf, _ := r.read("etc/ufw/ufw.conf")
	f.UFW = slices.Contains(strings.Fields(strings.ToUpper(conf)), "ENABLED=YES")
	f.CNI = readCNI(r)
	return f
}

// readCNI reads the directories of host-local: one for each network, in it a file for each address. One with a name that CNI would not
// take is left out: it may stand in a command.
func readCNI(r root) []cniNetwork {
	const dir = "var/lib/cni/networks"
	var out []cniNetwork
	networks, _ := os.ReadDir(r.path(dir))
	for _, n := range networks {
		if odd := strings.Trim(n.Name(), "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"); odd != "" || n.Name()[0] == '-' {
			continue
		}
		x := cniNetwork{dir: "/" + dir + "/" + n.Name()}
		addresses, _ := os.ReadDir(r.path(x.dir))
		for _, a := range addresses {
			if ip, err := netip.ParseAddr(a.Name()); err == nil {
				x.given = append(x.given, ip)
			}
		}
		out = append(out, x)
	}
	return out
}

func readSysctls(r root, s netstate.Survey) map[string]string {
	paths := []string{
		"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter", "net/ipv4/conf/all/forwarding",
		"net/netfilter/nf_conntrack_count", "net/netfilter/nf_conntrack_max", ipv6Off("default"),
	}
	for _, fam := range addr.Families() {
		paths = append(paths, netstate.BridgeNetfilter(fam).Path, ignoresPings(fam))
		for _, n := range []string{"1", "2", "3"} {
			paths = append(paths, threshold(fam, n))
		}
	}
	for _, l := range s.Links {
		if l.Kind == "veth" && l.Master != "" { // a port of a bridge routes nothing
			continue
		}
		paths = append(paths, rpFilter(l.Name), deviceForwarding(l.Name), ipv6Off(l.Name),
			"net/ipv6/conf/"+l.Name+"/accept_ra")
	}
	out := map[string]string{}
	for _, p := range paths {
		if v, ok := r.read("proc/sys/" + p); ok {
			out[p] = v
		}
	}
	return out
}

// ipv6Off is the setting by which a device has no IPv6.
func ipv6Off(device string) string { return "net/ipv6/conf/" + device + "/disable_ipv6" }

// ignoresPings is the setting by which a node answers no pings.
func ignoresPings(fam addr.Family) string {
	if fam == addr.IPv4 {
		return "net/ipv4/icmp_echo_ignore_all"
	}
	return "net/ipv6/icmp/echo_ignore_all"
}

func rpFilter(device string) string         { return "net/ipv4/conf/" + device + "/rp_filter" }
func deviceForwarding(device string) string { return "net/ipv4/conf/" + device + "/forwarding" }

func threshold(f addr.Family, n string) string {
	return fmt.Sprintf("net/ipv%d/neigh/default/gc_thresh%s", uint8(f), n)
}

// number is a setting as a number; false where it is not known.
func (f SystemFacts) number(path string) (int, bool) {
	v, ok := f.Sysctls[path]
	n, err := strconv.Atoi(v)
	return n, ok && err == nil
}

// readSockets reads /proc/net/udp and udp6: sl, local_address (hexadecimal ADDRESS:PORT), ..., the inode as the tenth.
func readSockets(r root) []udpSocket {
	var out []udpSocket
	for i, file := range []string{"proc/thread-self/net/udp", "proc/thread-self/net/udp6"} {
		b, err := os.ReadFile(r.path(file))
		if err != nil {
			continue
		}
		for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
			words := strings.Fields(sc.Text())
			if len(words) < 10 {
				continue
			}
			at, port, _ := strings.Cut(words[1], ":")
			raw, err := hex.DecodeString(port)
			if err != nil || len(raw) != 2 {
				continue
			}
			out = append(out, udpSocket{port: uint16(raw[0])<<8 | uint16(raw[1]), inode: words[9], v6: i == 1, any: i == 1 && takesIPv4(at)})
		}
	}
	return out
}

// takesIPv4 reports whether a socket at this address, as four hexadecimal words of the machine's order, may have the port for IPv4 too:
// that at no address of its own (but for IPV6_V6ONLY, which is not shown), and that at an IPv4 address in IPv6's clothes.
func takesIPv4(at string) bool {
	raw, err := hex.DecodeString(at)
	if err != nil || len(raw) != 16 {
		return false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.BigEndian.PutUint32(raw[i:], binary.NativeEndian.Uint32(raw[i:]))
	}
	a, _ := netip.AddrFromSlice(raw)
	return a.IsUnspecified() || a.Is4In6()
}

// runs looks for a process by its name, of which the kernel keeps 15 characters.
func runs(r root, comm string) bool {
	procs, _ := os.ReadDir(r.path("proc"))
	return slices.ContainsFunc(procs, func(p os.DirEntry) bool {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			return false
		}
		name, _ := r.read("proc/" + p.Name() + "/comm")
		return name == comm
	})
}

// holderOf finds the program that has a socket open. It looks through all processes: for the case that something is in the way.
func holderOf(r root, inode string) string {
	procs, _ := os.ReadDir(r.path("proc"))
	for _, p := range procs {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		dir := r.path("proc/" + p.Name() + "/fd")
		fds, _ := os.ReadDir(dir)
		for _, fd := range fds {
			if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && to == "socket:["+inode+"]" {
				comm, _ := r.read("proc/" + p.Name() + "/comm")
				return fmt.Sprintf("%s (process %s)", comm, p.Name())
			}
		}
	}
	return ""
}

// tableOverflows sums up the column table_fulls of /proc/net/stat/arp_cache, a line for each CPU.
func tableOverflows(r root) (int, bool) {
	sum, known := 0, false
	for _, file := range []string{"arp_cache", "ndisc_cache"} {
		b, err := os.ReadFile(r.path("proc/net/stat/" + file))
		if err != nil {
			continue
		}
		column := -1
		for line := range strings.Lines(string(b)) {
			words := strings.Fields(line)
			if column < 0 {
				column = slices.Index(words, "table_fulls")
				continue
			}
			if column < len(words) {
				n, _ := strconv.ParseUint(words[column], 16, 64)
				sum, known = sum+int(n), true
			}
		}
	}
	return sum, known
}

// device is one that no network manager should configure.
type device struct {
	name, kind string
	there      bool
}

// managedLike lists our devices, the pods' bridges and their ports. Of a kind that is not there yet it is one with
// the usual name; of ports, which are all alike, it is one of each bridge.
func managedLike(s netstate.Survey, bridges []netstate.PodBridge) []device {
	out := []device{}
	add := func(name, kind string) {
		if l, ok := s.Host.Link(name); ok && !slices.ContainsFunc(out, func(d device) bool { return d.name == name }) {
			out = append(out, device{name, l.Kind, true})
		} else if !slices.ContainsFunc(out, func(d device) bool { return d.kind == kind }) {
			out = append(out, device{name, kind, false})
		}
	}
	for _, l := range s.Host.Links {
		if l.Tunnel {
			add(l.Name, "vxlan")
		}
	}
	add("overlay.1", "vxlan")
	for _, b := range bridges {
		if _, ok := s.Host.Link(b.Name); !ok {
			continue
		}
		add(b.Name, "bridge")
		if i := slices.IndexFunc(s.Host.Links, func(l netstate.HostLink) bool { return l.Master == b.Name }); i >= 0 {
			add(s.Host.Links[i].Name, "veth")
		} else if len(b.Ports) > 0 { // it has lost them
			add(b.Ports[0].Name, "veth")
		}
	}
	add("cni0", "bridge")
	add("veth0", "veth")
	return out
}

// askNetworkManager lists those of the devices that NetworkManager manages. Not known: it does not answer, its
// networking is switched off (then it says "no" for all, until it is on again), or none of them is there.
func askNetworkManager(devices []device) (manages string, known bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	nmcli := func(args ...string) string {
		cmd := exec.CommandContext(ctx, "nmcli", args...)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err := cmd.Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	if nmcli("networking") == "disabled" {
		return "", false
	}
	var names []string
	for _, d := range devices {
		if !d.there {
			continue
		}
		switch nmcli("-g", "GENERAL.NM-MANAGED", "device", "show", d.name) {
		case "yes":
			names, known = append(names, d.name), true
		case "no":
			known = true
		}
	}
	return strings.Join(names, ", "), known
}

// lookAtManagers asks who else would configure devices like these.
func lookAtManagers(r root, devices []device) Managers {
	m := Managers{
		Udev: r.exists("run/udev/control"),
		// What these two leave in /run stays when they end.
		Networkd:       r.exists("run/systemd/netif/state") && runs(r, "systemd-network"),
		NetworkManager: r.exists("run/NetworkManager") && runs(r, "NetworkManager"),
	}
	for _, d := range devices {
		if file, text := firstMatch(r, ".network", d); file != "" && !isTrue(lastValue(text, "Link", "Unmanaged")) {
			m.NetworkFile, m.Managed = file, d.name
			break
		}
	}
	if file, text := firstMatch(r, ".link", devices[0]); file != "" {
		m.LinkFile, m.MACPolicy = file, lastValue(text, "Link", "MACAddressPolicy")
	}
	routes, rules := networkdSetting(r, "ManageForeignRoutes"), networkdSetting(r, "ManageForeignRoutingPolicyRules")
	m.ForeignRoutes = isFalse(routes) && isFalse(rules)
	m.NMIgnores = nmIgnores(r)
	return m
}

// unitDirs are where systemd looks for its files; of two with one name, the first counts.
func unitDirs() []string {
	return []string{"etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd", "lib/systemd"}
}

// unitFiles lists the files that systemd finds in a folder of its directories, in the order in which it reads them.
func unitFiles(r root, folder, suffix string) []string {
	files := map[string]string{}
	for _, dir := range slices.Backward(unitDirs()) {
		list, _ := os.ReadDir(r.path(dir + "/" + folder))
		for _, e := range list {
			if strings.HasSuffix(e.Name(), suffix) {
				files[e.Name()] = dir + "/" + folder + "/" + e.Name()
			}
		}
	}
	out := make([]string, 0, len(files))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		out = append(out, files[name])
	}
	return out
}

// firstMatch finds the file of /etc/systemd/network and its like that is taken for a device: the first in the order
// of the names whose [Match] fits.
func firstMatch(r root, suffix string, d device) (file, text string) {
	for _, f := range unitFiles(r, "network", suffix) {
		text, _ := r.read(f)
		if d.matches(text) {
			return "/" + f, text
		}
	}
	return "", ""
}

// matches reports whether a [Match] section fits a device. A condition that is not known here does not fit.
func (d device) matches(text string) bool {
	typ := "ether"
	if d.kind == "bridge" {
		typ = "bridge"
	}
	any := false
	for _, kv := range section(text, "Match") {
		any = true
		fits := false
		for word := range strings.FieldsSeq(kv[1]) {
			not := strings.HasPrefix(word, "!")
			pattern := strings.TrimPrefix(word, "!")
			value := map[string]string{"Name": d.name, "OriginalName": d.name, "Type": typ, "Kind": d.kind}[kv[0]]
			hit, _ := path.Match(pattern, value)
			fits = fits || hit != not && value != ""
		}
		if !fits {
			return false
		}
	}
	return any
}

// section lists the settings of one section of an INI file, in order.
func section(text, name string) [][2]string {
	var out [][2]string
	in := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			in = line == "["+name+"]"
		case in:
			k, v, _ := strings.Cut(line, "=")
			out = append(out, [2]string{strings.TrimSpace(k), strings.TrimSpace(v)})
		}
	}
	return out
}

func lastValue(text, sectionName, key string) string {
	v := ""
	for _, kv := range section(text, sectionName) {
		if kv[0] == key {
			v = kv[1]
		}
	}
	return v
}

func isTrue(s string) bool {
	return slices.Contains([]string{"1", "yes", "true", "on"}, strings.ToLower(s))
}

func isFalse(s string) bool {
	return slices.Contains([]string{"0", "no", "false", "off"}, strings.ToLower(s))
}

// networkdSetting is one of the [Network] section of networkd.conf and what is dropped in beside it.
func networkdSetting(r root, key string) string {
	v := ""
	if text, ok := r.read("etc/systemd/networkd.conf"); ok {
		v = lastValue(text, "Network", key)
	}
	for _, f := range unitFiles(r, "networkd.conf.d", ".conf") {
		text, _ := r.read(f)
		if own := lastValue(text, "Network", key); own != "" {
			v = own
		}
	}
	return v
}

// nmIgnores reports whether a file of NetworkManager names our devices as unmanaged.
func nmIgnores(r root) bool {
	found := false
	for _, dir := range []string{"etc/NetworkManager", "usr/lib/NetworkManager", "run/NetworkManager"} {
		_ = filepath.WalkDir(r.path(dir), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(p, ".conf") {
				return nil //nolint:nilerr // what can't be read says nothing
			}
			b, _ := os.ReadFile(p)
			text := string(b)
			if strings.Contains(text, "interface-name:overlay") && (strings.Contains(text, "unmanaged-devices") || strings.Contains(text, "managed=0")) {
				found = true
			}
			return nil
		})
	}
	return found
}

// trySupport tries in a namespace of its own what the kernel and the system must be able to do for this node.
func trySupport(f *Facts) []support {
	var out []support
	firewallUp := f.Daemon.Running && !f.Daemon.Status.Firewall.Checked.IsZero()
	deviceUp := f.Daemon.Running && len(f.Daemon.Status.Devices) > 0 && len(f.Survey.Ours.Links) > 0
	try := func(what string, do func() error, steps ...string) { out = append(out, support{what, do(), steps}) }
	err := netstate.InTrial(func() {
		if f.backend() == subnet.VXLAN && !deviceUp {
			try("VXLAN devices", func() error { return netstate.TryVXLAN(addr.IPv4) }, "modprobe vxlan && echo vxlan > /etc/modules-load.d/overlayd.conf")
		}
		if f.backend() == subnet.HostGW || f.Config != nil && f.Config.Backend.DirectRouting {
			try("address sets (ipset)", trySets, "modprobe -a ip_set_hash_ip xt_set && printf 'ip_set_hash_ip\\nxt_set\\n' >> /etc/modules-load.d/overlayd.conf")
		}
		if !firewallUp {
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
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "iptables-restore")
	cmd.Stdin = strings.NewReader("*nat\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nf_tables: %w; iptables-restore: %s", inKernel, firstLine(string(out), err))
	}
	return nil
}

func firstLine(out string, err error) string {
	if line, _, _ := strings.Cut(strings.TrimSpace(out), "\n"); line != "" {
		return line
	}
	return err.Error()
}
