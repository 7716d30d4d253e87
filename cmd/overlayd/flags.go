package main

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

const (
	defaultStateDir   = "/var/lib/overlayd"
	defaultSubnetFile = "/run/overlayd/subnet.env"
	defaultSocket     = "/run/overlayd/overlayd.sock"
	machineIDFile     = "/etc/machine-id"
)

// flags is everything that an operator can set, as it was typed.
type flags struct {
	store                       etcd.Options
	givenEndpoints, givenPrefix bool // on the command line
	initConfig                  string

	file    envFile  // of commands; the daemon has its environment
	unknown []string // variables of the environment that look like settings

	nodeName, nodeID     string
	subnetFile, stateDir string

	ifaces, ifaceRegexes []string
	ifaceCanReach        string
	publicIP, publicIPv6 string
	ipMasq, forwardRules bool
	ipForward            bool
	bridgeNetfilter      bool
	sysctlDir            string
	masqExclude          []string
	firewall, iptables   string
	leaseTTL             seconds
	iptablesResync       seconds
	meshProbe            bool
	stalePeerGrace       seconds
	healthzIP            string
	healthzPort          int
	pprof                uint16
	socket               string
	logLevel, logFormat  string
}

func (f *flags) addStore(s *pflag.FlagSet) {
	s.StringSliceVar(&f.store.Endpoints, "etcd-endpoints", []string{"http://127.0.0.1:2379"}, "etcd endpoint `URLs`, comma-separated")
	s.StringVar(&f.store.Prefix, "etcd-prefix", etcd.DefaultPrefix, "Key `prefix` of the network in etcd")
	s.StringVar(&f.store.CertFile, "etcd-certfile", "", "Client certificate `file` (PEM); reloaded when it changes")
	s.StringVar(&f.store.KeyFile, "etcd-keyfile", "", "Client key `file` (PEM); reloaded when it changes")
	s.StringVar(&f.store.CAFile, "etcd-cafile", "", "CA certificate `file` to verify etcd (PEM); reloaded when it changes")
	s.StringVar(&f.store.Username, "etcd-username", "", "etcd user `name`")
	s.StringVar(&f.store.Password, "etcd-password", "", "etcd `password`; visible to all users of the node: prefer --etcd-password-file")
	s.StringVar(&f.store.PasswordFile, "etcd-password-file", "", "Read the etcd password from this `file`; reloaded when etcd rejects it")
}

func (f *flags) addNode(s *pflag.FlagSet) {
	s.StringVar(&f.nodeName, "node-name", "", "Unique `name` of this node (default: the host name)")
	s.StringVar(&f.nodeID, "node-id", "", "Unique, permanent `ID` of this machine (default: from "+machineIDFile+")")
	s.StringVar(&f.subnetFile, "subnet-file", defaultSubnetFile, "Subnet `file` to write for CNI plugins")
	s.StringVar(&f.stateDir, "state-dir", defaultStateDir, "State `directory`: the node's last subnet and peers")
	s.StringVar(&f.socket, "socket", defaultSocket, "Unix `socket` for overlayd's commands on this node; empty: none")
	s.StringVar(&f.firewall, "firewall", string(masquerade.KindAuto), "Firewall `driver`: auto (what the host and kube-proxy use), iptables or nftables")
	s.StringVar(&f.iptables, "iptables-variant", "", "iptables `variant`: nft or legacy (default: what the host uses)")
}

func (f *flags) addDaemon(s *pflag.FlagSet) {
	s.StringVar(&f.initConfig, "init-config", "", "JSON `file` to write to etcd as the network config if there is none")
	f.leaseTTL = seconds(etcd.DefaultLeaseTTL)
	s.Var(&f.leaseTTL, "lease-ttl", "Time until a lease expires once its node stops renewing it")
	s.StringSliceVar(&f.ifaces, "iface", nil, "External `interface` or its address; the first match wins (default: the interface of the default route)")
	s.StringArrayVar(&f.ifaceRegexes, "iface-regex", nil,
		"Use the interface whose name or address matches this `pattern`, after --iface; repeatable")
	s.StringVar(&f.ifaceCanReach, "iface-can-reach", "",
		"Use the interface that reaches this `address`, after --iface and --iface-regex")
	s.StringVar(&f.publicIP, "public-ip", "",
		"IPv4 `address` to announce to peers: of a device of this node, or of NAT in front of it")
	s.StringVar(&f.publicIPv6, "public-ipv6", "",
		"IPv6 `address` to announce to peers: of a device of this node, or of NAT in front of it")
	s.BoolVar(&f.ipMasq, "ip-masq", true, "Masquerade traffic that leaves the pod network")
	s.StringSliceVar(&f.masqExclude, "ip-masq-exclude", nil, "Destination `network` (CIDR) to exclude from masquerading; repeatable")
	s.BoolVar(&f.forwardRules, "iptables-forward-rules", true, "Accept traffic of the pod network in the FORWARD chain")
	s.BoolVar(&f.ipForward, "ip-forward", true, "Enable IP forwarding for the families in use")
	s.BoolVar(&f.bridgeNetfilter, "bridge-netfilter", false, "Enable net.bridge.bridge-nf-call-iptables and -ip6tables, as kube-proxy needs (module br_netfilter)")
	s.StringVar(&f.sysctlDir, "sysctl-dir", "/proc/sys", "Write sysctls below this `directory`; in a container, a mount of the host's")
	f.iptablesResync = seconds(10 * time.Second)
	s.Var(&f.iptablesResync, "iptables-resync", "Resync interval of firewall rules for which the kernel sends no notifications; a plain number is in seconds")
	f.stalePeerGrace = seconds(10 * time.Minute)
	s.Var(&f.stalePeerGrace, "stale-peer-grace", "Time to keep peers whose leases are missing after etcd lost data")
	s.BoolVar(&f.meshProbe, "mesh-probe", true, "Ping the peers in turn, at most ten packets per second")
	s.StringVar(&f.healthzIP, "healthz-ip", "127.0.0.1", "Listen `address` for /healthz, /readyz, /metrics, /status, /peers and the page at /")
	s.IntVar(&f.healthzPort, "healthz-port", 8471, "Listen `port` for these; 0: off")
	s.Uint16Var(&f.pprof, "pprof", 0, "Loopback `port` for Go profiles of the daemon; 0: off")
	s.StringVar(&f.logLevel, "log-level", "info", "Minimum log `level`: debug, info, warn or error")
	s.StringVar(&f.logFormat, "log-format", "console", "Log `format`: console or json")
}

// seconds is a duration that may also be given as flannel's plain number.
type seconds time.Duration

func (s *seconds) String() string { return time.Duration(*s).String() }
func (*seconds) Type() string     { return "duration" }

func (s *seconds) Set(text string) error {
	if n, err := strconv.Atoi(text); err == nil {
		*s = seconds(time.Duration(n) * time.Second)
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("expected a duration such as 10s")
	}
	*s = seconds(d)
	return nil
}

// envName is the variable that sets a flag: OVERLAYD_ETCD_ENDPOINTS for --etcd-endpoints.
func envName(flag string) string {
	return "OVERLAYD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// fromEnvironment sets from the environment what the command line does not.
func fromEnvironment(s *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var errs []error
	s.VisitAll(func(f *pflag.Flag) {
		v, ok := lookup(envName(f.Name))
		if !ok || f.Changed || f.Name == "help" || f.Name == "version" {
			return
		}
		if err := s.Set(f.Name, v); err != nil {
			shown := fmt.Sprintf("%q", v)
			if strings.Contains(f.Name, "password") {
				shown = "its value"
			}
			errs = append(errs, fmt.Errorf("%s: %s is not valid for --%s: %w", envName(f.Name), shown, f.Name, errors.Unwrap(err)))
		}
	})
	if len(errs) > 0 {
		return usageError{errors.Join(errs...)}
	}
	return nil
}

// identity is who this node is.
func (f flags) identity() (subnet.Identity, error) {
	id := subnet.Identity{NodeName: f.nodeName, NodeID: f.nodeID}
	if id.NodeName == "" {
		name, err := os.Hostname()
		if err != nil || name == "" {
			return id, usageError{errors.New("--node-name: this machine has no host name, set one")}
		}
		id.NodeName = name
	}
	if id.NodeID == "" {
		raw, err := os.ReadFile(machineIDFile)
		id.NodeID = strings.TrimSpace(string(raw))
		if err != nil || id.NodeID == "" || id.NodeID == "uninitialized" {
			return id, usageError{fmt.Errorf("--node-id: %s has none, set one that is unique and permanent", machineIDFile)}
		}
	}
	if err := id.Check(); err != nil {
		return id, usageError{fmt.Errorf("--node-name, --node-id: %w", err)}
	}
	return id, nil
}

// agentOptions checks all that concerns the node.
func (f flags) agentOptions() (agent.Options, error) {
	id, err := f.identity()
	if err != nil {
		return agent.Options{}, err
	}
	o := agent.Options{
		Identity: id, SubnetFile: f.subnetFile, StateDir: f.stateDir, IPMasq: f.ipMasq, ForwardRules: f.forwardRules,
		IPForward: f.ipForward, BridgeNetfilter: f.bridgeNetfilter, MeshProbe: f.meshProbe, IPTablesResync: time.Duration(f.iptablesResync), StalePeerGrace: time.Duration(f.stalePeerGrace),
	}
	var errs []error
	o.Interface, err = f.interfaceOptions()
	errs = append(errs, err)
	for _, s := range f.masqExclude {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("--ip-masq-exclude: expected a network such as 192.0.2.0/24, found %q", s))
			continue
		}
		o.MasqExclude = append(o.MasqExclude, p.Masked())
	}
	if err := errors.Join(append(errs, o.Validate())...); err != nil {
		return o, usageError{err}
	}
	return o, nil
}

func (f flags) interfaceOptions() (agent.InterfaceOptions, error) {
	o := agent.InterfaceOptions{Names: f.ifaces}
	var errs []error
	for _, s := range f.ifaceRegexes {
		re, err := regexp.Compile(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("--iface-regex: expected a regular expression, found %q: %w", s, err))
			continue
		}
		o.Regexes = append(o.Regexes, re)
	}
	parse := func(flag, text, kind string, family ...addr.Family) netip.Addr {
		a, err := netip.ParseAddr(text)
		if text == "" || err == nil && slices.Contains(family, addr.FamilyOf(a)) && !a.Is4In6() && !a.IsUnspecified() && a.Zone() == "" {
			return a
		}
		errs = append(errs, fmt.Errorf("%s: expected an %s address, found %q", flag, kind, text))
		return netip.Addr{}
	}
	o.CanReach = parse("--iface-can-reach", f.ifaceCanReach, "IP", addr.IPv4, addr.IPv6)
	o.PublicIP.V4 = parse("--public-ip", f.publicIP, "IPv4", addr.IPv4)
	o.PublicIP.V6 = parse("--public-ipv6", f.publicIPv6, "IPv6", addr.IPv6)
	return o, errors.Join(errs...)
}

// storeOptions completes the options of the store.
func (f flags) storeOptions() (etcd.Options, error) {
	o := f.store
	o.LeaseTTL = time.Duration(f.leaseTTL)
	if f.initConfig == "" {
		return o, nil
	}
	raw, err := os.ReadFile(f.initConfig)
	if err != nil {
		return o, usageError{fmt.Errorf("--init-config: %w", err)}
	}
	if _, err := subnet.ParseConfig(raw); err != nil {
		return o, usageError{fmt.Errorf("--init-config: %s: %w", f.initConfig, err)}
	}
	o.InitConfig = raw
	return o, nil
}

// firewallOptions checks what the operator says about the firewall.
func (f flags) firewallOptions() (masquerade.Options, error) {
	kind, err := masquerade.ParseKind(f.firewall)
	if err != nil {
		return masquerade.Options{}, usageError{fmt.Errorf("--firewall: %w", err)}
	}
	variant, err := masquerade.ParseVariant(f.iptables)
	if err != nil {
		return masquerade.Options{}, usageError{fmt.Errorf("--iptables-variant: %w", err)}
	}
	return masquerade.Options{Kind: kind, Variant: variant}, nil
}

// healthAddress is where the health checks are served; not valid where they are turned off.
func (f flags) healthAddress() (netip.AddrPort, error) {
	ip, err := netip.ParseAddr(f.healthzIP)
	if f.healthzPort == 0 {
		return netip.AddrPort{}, nil
	}
	switch {
	case err != nil:
		return netip.AddrPort{}, usageError{fmt.Errorf("--healthz-ip: expected an IP address, found %q", f.healthzIP)}
	case f.healthzPort < 0 || f.healthzPort > math.MaxUint16:
		return netip.AddrPort{}, usageError{fmt.Errorf("--healthz-port: expected 0 to 65535, found %d", f.healthzPort)}
	}
	return netip.AddrPortFrom(ip, uint16(f.healthzPort)), nil
}

// listen opens that address; nil where there is none.
func listen(a netip.AddrPort) (net.Listener, error) {
	if !a.IsValid() {
		return nil, nil
	}
	l, err := net.Listen("tcp", a.String())
	if err != nil {
		return nil, fmt.Errorf("--healthz-ip, --healthz-port: %w", err)
	}
	return l, nil
}

func (f flags) logger() (*zap.Logger, zap.AtomicLevel, error) {
	level, err := zapcore.ParseLevel(f.logLevel)
	if err != nil {
		return nil, zap.AtomicLevel{}, usageError{fmt.Errorf("--log-level: expected debug, info, warn or error, found %q", f.logLevel)}
	}
	c := zap.NewProductionConfig()
	c.Level = zap.NewAtomicLevelAt(level)
	c.Sampling, c.DisableCaller, c.DisableStacktrace = nil, true, true
	c.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	c.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	encoder := zapcore.NewConsoleEncoder
	switch f.logFormat {
	case "json":
		encoder = zapcore.NewJSONEncoder
	case "console":
		if c.Encoding = "console"; toJournal() {
			c.EncoderConfig.TimeKey = zapcore.OmitKey
		}
	default:
		return nil, zap.AtomicLevel{}, usageError{fmt.Errorf("--log-format: expected console or json, found %q", f.logFormat)}
	}
	var options []zap.Option
	if toJournal() {
		options = append(options, zap.WrapCore(func(zapcore.Core) zapcore.Core {
			lines := journalEncoder{encoder(c.EncoderConfig), buffer.NewPool()}
			return zapcore.NewCore(lines, zapcore.Lock(os.Stderr), c.Level)
		}))
	}
	log, err := c.Build(options...)
	return log, c.Level, err
}
