// Package subnet is the model of the cluster network: its configuration, the leases by which nodes hold their pod
// subnets, how a node chooses one, and which leases of others it accepts. All of it is pure: values in, values out;
// the stores are packages subnet/etcd and subnet/kube.
package subnet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/jsonobject"
)

// BackendType names how packets get from node to node.
type BackendType string

// The backends that a network config may ask for.
const (
	VXLAN     BackendType = "vxlan"
	HostGW    BackendType = "host-gw"
	WireGuard BackendType = "wireguard"
)

const (
	defaultVNI  = 1
	defaultPort = 8472 // Linux's own default (drivers/net/vxlan), which flannel uses too; IANA's is 4789
	maxVNI      = 1<<24 - 1
	minMTU4     = 576  // RFC 791: what every IPv4 host must take
	minMTU6     = 1280 // RFC 8200 §5: what pods with IPv6 must be able to send
	maxMTU      = 65535

	// WireGuard has no port of its own. These are flannel's.
	defaultListenPort4 = 51820
	defaultListenPort6 = 51821

	maxConfigSize = 64 << 10
)

// Backend is the checked "Backend" part of the network config.
type Backend struct {
	Type          BackendType
	VNI           uint32 // 1 to 2^24-1 (RFC 7348 §5)
	Port          uint16 // UDP destination port on the underlay
	GBP           bool   // group based policy bits in the VXLAN header
	Learning      bool   // let the device learn where MACs are
	DirectRouting bool   // plain routes to the peers that need no gateway
	MTU           int    // of the packets between the nodes; 0: that of the underlay

	ListenPort addr.Per[uint16] // WireGuard's UDP ports on the underlay, one for each family
	Keepalive  int              // seconds after which WireGuard sends something if there is nothing to send; 0: nothing
}

// Overhead is what the backend adds to a packet of a pod: with vxlan the inner Ethernet header (14 bytes), VXLAN (8),
// UDP (8), and the outer IPv4 (20) or IPv6 (40) header (RFC 7348 §5); with wireguard the message header (16), its
// authentication tag (16), UDP (8) and the largest outer header, which wg-quick and flannel subtract for both families.
func (b Backend) Overhead(f addr.Family) int {
	switch {
	case b.Type == WireGuard:
		return 80
	case b.Type != VXLAN:
		return 0
	case f == addr.IPv4:
		return 50
	}
	return 70
}

// LeastMTU is the smallest MTU between the nodes by which the network can work, with IPv6 among its families or
// without.
func (b Backend) LeastMTU(ipv6 bool) int {
	if ipv6 {
		return minMTU6 + b.Overhead(addr.IPv6)
	}
	return minMTU4
}

// Pool is one family's part of the network, and which subnets of it may be leased. The zero Pool is a family not in
// use.
type Pool struct {
	Network   netip.Prefix
	SubnetLen int
	Min, Max  netip.Addr // first address of the first and of the last subnet
}

// Config is the checked network config: what `PREFIX/config` says, with flannel's keys and defaults.
type Config struct {
	Pools   addr.Per[Pool]
	Backend Backend
}

// Families lists the families that the network uses.
func (c Config) Families() []addr.Family {
	var fs []addr.Family
	for _, f := range addr.Families() {
		if c.Pools.Get(f).On() {
			fs = append(fs, f)
		}
	}
	return fs
}

// Used are those of a node's subnets that are of a family that the network uses.
func (c Config) Used(subnets addr.Per[netip.Prefix]) (out addr.Per[netip.Prefix]) {
	for _, f := range c.Families() {
		out.Set(f, subnets.Get(f))
	}
	return out
}

// FittedTo is the config with pools whose subnets are as long as those of a node, where a store other than etcd has
// assigned them, of a length of its own. They begin with the network's first one.
func (c Config) FittedTo(own addr.Per[netip.Prefix]) Config {
	for _, f := range c.Families() {
		p, sn := c.Pools.Get(f), own.Get(f)
		if sn.IsValid() && sn.Bits() >= p.Network.Bits() {
			c.Pools.Set(f, NewPool(p.Network, sn.Bits()))
		}
	}
	return c
}

// Contains reports whether an address lies inside the cluster network.
func (c Config) Contains(a netip.Addr) bool {
	p := c.Pools.Get(addr.FamilyOf(a))
	return p.On() && p.Network.Contains(a)
}

// Difference is a key of the network config that has another meaning in another config.
type Difference struct {
	Key          string // its JSON path
	Value, Other string // with defaults filled in
}

// Differences lists the keys in which another config means something else, however either is written. What only follows
// from a key that is listed, or means nothing with the backend, is left out.
func (c Config) Differences(other Config) []Difference {
	var out []Difference
	add := func(key string, value, theirs any) {
		if value != theirs {
			out = append(out, Difference{key, fmt.Sprint(value), fmt.Sprint(theirs)})
		}
	}
	for _, k := range configKeys() {
		p, q := c.Pools.Get(k.family), other.Pools.Get(k.family)
		if p.On() != q.On() {
			add(k.enable, p.On(), q.On())
			continue
		}
		add(k.network, p.Network, q.Network)
		add(k.len, p.SubnetLen, q.SubnetLen)
		if p.Network == q.Network && p.SubnetLen == q.SubnetLen { // the bounds follow from these by default
			add(k.min, p.Min, q.Min)
			add(k.max, p.Max, q.Max)
		}
	}
	b, d := c.Backend, other.Backend
	add("Backend.Type", b.Type, d.Type)
	add("Backend.MTU", b.MTU, d.MTU)
	if b.Type == VXLAN && d.Type == VXLAN {
		add("Backend.VNI", b.VNI, d.VNI)
		add("Backend.Port", b.Port, d.Port)
		add("Backend.GBP", b.GBP, d.GBP)
		add("Backend.Learning", b.Learning, d.Learning)
		add("Backend.DirectRouting", b.DirectRouting, d.DirectRouting)
	}
	if b.Type == WireGuard && d.Type == WireGuard {
		add("Backend.ListenPort", b.ListenPort.V4, d.ListenPort.V4)
		add("Backend.ListenPortV6", b.ListenPort.V6, d.ListenPort.V6)
		add("Backend.PersistentKeepaliveInterval", b.Keepalive, d.Keepalive)
	}
	return out
}

// On reports whether the family is in use.
func (p Pool) On() bool { return p.Network.IsValid() }

// familyKeys are the names that the config has for one family's settings, and the bounds that flannel sets on them.
type familyKeys struct {
	family                         addr.Family
	enable, network, len, min, max string
	enabled                        bool // when `enable` is absent
	defaultLen, maxLen             int
}

func configKeys() [2]familyKeys {
	return [2]familyKeys{
		{addr.IPv4, "EnableIPv4", "Network", "SubnetLen", "SubnetMin", "SubnetMax", true, 24, 30},
		{addr.IPv6, "EnableIPv6", "IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", false, 64, 126},
	}
}

// ParseConfig reads a network config. An error names the JSON path and what was expected there; all errors are reported
// at once. Keys that it doesn't know are left alone (see UnknownKeys).
func ParseConfig(data []byte) (Config, error) {
	if len(data) > maxConfigSize {
		return Config{}, fmt.Errorf("network config: %d bytes, expected at most %d", len(data), maxConfigSize)
	}
	o, err := parseObject(data)
	if err != nil {
		return Config{}, fmt.Errorf("network config: %w", err)
	}
	var c Config
	for _, k := range configKeys() {
		c.Pools.Set(k.family, parsePool(o, k))
	}
	if len(c.Families()) == 0 && o.ok() {
		o.fail("EnableIPv4", "one of EnableIPv4 and EnableIPv6 to be true")
	}
	c.Backend = parseBackend(o, c.Pools.V6.On())
	if !o.ok() {
		return Config{}, fmt.Errorf("network config: %w", joined(*o.errs...))
	}
	return c, nil
}

// UnknownKeys lists the paths of a config's keys that mean nothing here, for a warning: most often a slip of the pen.
// Keys of flannel for what each node decides here, or for other systems, are none.
func UnknownKeys(data []byte) []string {
	o, err := parseObject(data)
	if err != nil {
		return nil
	}
	known := []string{"Backend", "EnableNFTables"}
	for _, k := range configKeys() {
		known = append(known, k.enable, k.network, k.len, k.min, k.max)
	}
	out := o.unknown(known)
	return append(out, o.object("Backend").
		unknown([]string{
			"Type", "VNI", "Port", "GBP", "Learning", "DirectRouting", "MTU", "MacPrefix", "Name",
			"ListenPort", "ListenPortV6", "PersistentKeepaliveInterval", "Mode", "PSK",
		})...)
}

// NewPool is a pool of all subnets of a network, from the first to the last.
func NewPool(network netip.Prefix, subnetLen int) Pool {
	p := Pool{Network: network, SubnetLen: subnetLen, Min: network.Addr()}
	p.Max = p.floor(addr.Last(network))
	return p
}

func parsePool(o object, k familyKeys) Pool {
	if !o.bool(k.enable, k.enabled) {
		return Pool{}
	}
	network := o.prefix(k.network, k.family)
	if !network.IsValid() {
		return Pool{}
	}
	if special(network) {
		o.fail(k.network, "a unicast network that is not loopback, link-local or unspecified")
		return Pool{}
	}
	// Four subnets at least: the first is left out by default, and one node alone makes no network.
	deflt := max(k.defaultLen, network.Bits()+2)
	if deflt > k.maxLen {
		o.fail(k.network, fmt.Sprintf("a prefix of at most /%d", k.maxLen-2))
		return Pool{}
	}
	p := Pool{Network: network, SubnetLen: o.int(k.len, deflt, network.Bits()+2, k.maxLen)}
	if p.SubnetLen == 0 { // flannel's "not set"
		p.SubnetLen = deflt
	}
	all := NewPool(network, p.SubnetLen)
	// The first subnet is left out: its first address is the network's own, which older stacks take for a broadcast.
	p.Min = o.subnetAddr(k.min, all.Subnet(1).Addr(), p)
	p.Max = o.subnetAddr(k.max, all.Max, p)
	if p.Min.IsValid() && p.Max.IsValid() && p.Max.Less(p.Min) {
		o.fail(k.max, fmt.Sprintf("an address not below %s (%s)", k.min, p.Min))
	}
	return p
}

func parseBackend(o object, ipv6 bool) Backend {
	b := o.object("Backend")
	types := fmt.Sprintf("%q, %q or %q", VXLAN, HostGW, WireGuard)
	out := Backend{
		Type:          BackendType(strings.ToLower(b.string("Type", string(VXLAN), types))), // in any case, as in flannel
		VNI:           uint32(b.int("VNI", defaultVNI, 1, maxVNI)),
		Port:          uint16(b.int("Port", defaultPort, 1, math.MaxUint16)),
		GBP:           b.bool("GBP", false),
		Learning:      b.bool("Learning", false),
		DirectRouting: b.bool("DirectRouting", false),
		ListenPort: addr.Per[uint16]{
			V4: uint16(b.int("ListenPort", defaultListenPort4, 1, math.MaxUint16)),
			V6: uint16(b.int("ListenPortV6", defaultListenPort6, 1, math.MaxUint16)),
		},
		Keepalive: b.int("PersistentKeepaliveInterval", 0, 0, math.MaxUint16),
	}
	out.MTU = b.int("MTU", 0, out.LeastMTU(ipv6), maxMTU)
	if out.Port == 0 {
		out.Port = defaultPort
	}
	if out.VNI == 0 {
		b.fail("VNI", fmt.Sprintf("a number from 1 to %d", maxVNI))
	}
	switch out.Type {
	case VXLAN, HostGW:
	case WireGuard:
		if out.ListenPort.V4 == out.ListenPort.V6 {
			b.fail("ListenPortV6", "another port than ListenPort")
		}
		const separate = "separate" // of flannel's modes
		if b.string("Mode", separate, strconv.Quote(separate)) != separate {
			b.fail("Mode", strconv.Quote(separate)+", a device for each family")
		}
		if len(b.Get("PSK")) > 0 {
			b.fail("PSK", "no key that all who read the store can read")
		}
	default:
		b.fail("Type", types)
	}
	return out
}

// special reports whether a network overlaps what no pod can have.
func special(p netip.Prefix) bool {
	for _, s := range []string{
		"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/16", "fe80::/10", "ff00::/8",
	} {
		if netip.MustParsePrefix(s).Overlaps(p) {
			return true
		}
	}
	return false
}

// object is a JSON object that is being read. It knows its path, and gathers what is wrong in a list that it shares
// with the objects in it.
type object struct {
	jsonobject.Object
	path string
	errs *[]error
}

func parseObject(data []byte) (object, error) {
	o := object{errs: new([]error)}
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&o.Object); err != nil || o.Object == nil {
		return o, fmt.Errorf("expected a JSON object, found %s", jsonobject.Excerpt(data))
	}
	if _, err := dec.Token(); err != io.EOF {
		return o, errors.New("expected one JSON object, found more text after it")
	}
	return o, nil
}

func (o object) ok() bool { return len(*o.errs) == 0 }

func (o object) fail(key, expected string) {
	found := o.Get(key)
	if string(found) == "null" {
		found = nil
	}
	*o.errs = append(*o.errs, jsonobject.Unexpected(o.path+key, expected, found))
}

// read reads a value into v, which stays as it is where there is none; not ok: it is something else than expected.
func (o object) read(key string, v any, expected string) (ok bool) {
	err := o.Decode(key, v, expected)
	if err != nil {
		*o.errs = append(*o.errs, fmt.Errorf("%s%w", o.path, err))
	}
	return err == nil
}

func (o object) unknown(known []string) []string {
	var out []string
	for _, f := range o.Object {
		if !slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, f.Key) }) {
			out = append(out, o.path+f.Key)
		}
	}
	return out
}

func (o object) object(key string) object {
	sub := object{path: o.path + key + ".", errs: o.errs}
	o.read(key, &sub.Object, "a JSON object")
	return sub
}

func (o object) bool(key string, v bool) bool {
	return o.read(key, &v, "true or false") && v
}

func (o object) string(key, v, expected string) string {
	o.read(key, &v, expected)
	return v
}

// int reads a number between lo and hi; 0 passes too, since flannel takes it for "not set".
func (o object) int(key string, deflt, lo, hi int) int {
	v, expected := deflt, fmt.Sprintf("a number from %d to %d", lo, hi)
	if o.read(key, &v, expected) && v != 0 && (v < lo || v > hi) {
		o.fail(key, expected)
		return deflt
	}
	return v
}

func (o object) prefix(key string, f addr.Family) netip.Prefix {
	example := addr.Per[string]{V4: "10.244.0.0/16", V6: "fd00:10:244::/48"}.Get(f)
	want := fmt.Sprintf("an %s network such as %s", f, example)
	var s string
	if !o.read(key, &s, want) {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || addr.FamilyOf(p.Addr()) != f || p.Addr().Is4In6() {
		o.fail(key, want)
		return netip.Prefix{}
	}
	return p.Masked() // flannel drops host bits too
}

// subnetAddr reads the first address of a subnet of the pool. The unspecified address is flannel's "not set".
func (o object) subnetAddr(key string, deflt netip.Addr, p Pool) netip.Addr {
	want := fmt.Sprintf("the first address of a /%d inside %s", p.SubnetLen, p.Network)
	s := o.string(key, "", want)
	if s == "" {
		return deflt
	}
	a, err := netip.ParseAddr(s)
	if err == nil && a.IsUnspecified() && a.BitLen() == deflt.BitLen() {
		return deflt
	}
	if err != nil || !p.Network.Contains(a) || p.floor(a) != a {
		o.fail(key, want)
		return netip.Addr{}
	}
	return a
}

// joined is several errors as one that reads as one line, for logs and terminals; nil where none of them is one.
func joined(errs ...error) error {
	if err := errors.Join(errs...); err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}
