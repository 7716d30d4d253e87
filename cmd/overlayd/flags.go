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
	s.StringSliceVar(&f.store.Endpoints, "etcd-endpoints", []string{"http://127.0.0.1:2379"}, "etcd `URLs`, separated by commas")
	s.StringVar(&f.store.Prefix, "etcd-prefix", etcd.DefaultPrefix, "the `key` under which the network lives in etcd")
	s.StringVar(&f.store.CertFile, "etcd-certfile", "", "client certificate `file` (PEM); read again when it changes")
	s.StringVar(&f.store.KeyFile, "etcd-keyfile", "", "client key `file` (PEM); read again when it changes")
	s.StringVar(&f.store.CAFile, "etcd-cafile", "", "`file` with the CAs that vouch for etcd (PEM); read again when it changes")
	s.StringVar(&f.store.Username, "etcd-username", "", "etcd user `name`")
	s.StringVar(&f.store.Password, "etcd-password", "", "etcd `password`; everybody on the node can read a command line: prefer --etcd-password-file")
	s.StringVar(&f.store.PasswordFile, "etcd-password-file", "", "`file` with the etcd password; read again when etcd refuses it")
}

func (f *flags) addNode(s *pflag.FlagSet) {
	s.StringVar(&f.nodeName, "node-name", "", "`name` of this node, unique in the network (default: the host name)")
	s.StringVar(&f.nodeID, "node-id", "", "`ID` of this machine, unique and lasting (default: the content of "+machineIDFile+")")
	s.StringVar(&f.subnetFile, "subnet-file", defaultSubnetFile, "`file` that tells CNI plugins the subnet and MTU")
	s.StringVar(&f.stateDir, "state-dir", defaultStateDir, "`directory` in which the node remembers its subnet")
	s.StringVar(&f.socket, "socket", defaultSocket, "unix `socket` by which commands on this node ask the daemon; empty: none")
	s.StringVar(&f.firewall, "firewall", string(masquerade.KindAuto), "`what` holds the rules: auto (what the host and kube-proxy use), iptables or nftables")
	s.StringVar(&f.iptables, "iptables-variant", "", "`variant` of iptables: nft or legacy (default: what the host uses)")
}

func (f *flags) addDaemon(s *pflag.FlagSet) {
	s.StringVar(&f.initConfig, "init-config", "", "JSON `file` that is put into etcd as the network config when there is none")
	f.leaseTTL = seconds(etcd.DefaultLeaseTTL)
	s.Var(&f.leaseTTL, "lease-ttl", "how long a lease outlives its node")
	s.StringSliceVar(&f.ifaces, "iface", nil, "`device or address` that leads to the other nodes; several: the first that fits (default: the device with the default route)")
	s.StringArrayVar(&f.ifaceRegexes, "iface-regex", nil,
		"`pattern` for the device's name or address, tried where no --iface fits; repeatable")
	s.StringVar(&f.ifaceCanReach, "iface-can-reach", "",
		"take the device that leads to this `address`, where neither --iface nor --iface-regex fits")
	s.StringVar(&f.publicIP, "public-ip", "",
		"IPv4 `address` that the others reach this node at: of one of its devices, or behind NAT")
	s.StringVar(&f.publicIPv6, "public-ipv6", "",
		"IPv6 `address` that the others reach this node at: of one of its devices, or behind NAT")
	s.BoolVar(&f.ipMasq, "ip-masq", true, "masquerade what leaves the pod network")
	s.StringSliceVar(&f.masqExclude, "ip-masq-exclude", nil, "`network` (CIDR) that sees the pods' own addresses; repeatable")
	s.BoolVar(&f.forwardRules, "iptables-forward-rules", true, "accept the pod network's packets in the FORWARD chain")
	s.BoolVar(&f.ipForward, "ip-forward", true, "switch on forwarding in the kernel for the families in use")
	s.BoolVar(&f.bridgeNetfilter, "bridge-netfilter", false, "keep net.bridge.bridge-nf-call-iptables and -ip6tables on, as kube-proxy needs it (module br_netfilter)")
	s.StringVar(&f.sysctlDir, "sysctl-dir", "/proc/sys", "`directory` where settings of the kernel are written; in a container, a mount of the host's")
	f.iptablesResync = seconds(10 * time.Second)
	s.Var(&f.iptablesResync, "iptables-resync", "how often to compare firewall rules that the kernel sends no notifications of; a number is in seconds")
	f.stalePeerGrace = seconds(10 * time.Minute)
	s.Var(&f.stalePeerGrace, "stale-peer-grace", "how long to keep peers whose leases vanished because etcd lost its data")
	s.BoolVar(&f.meshProbe, "mesh-probe", true, "ping the other nodes in turn, at most ten packets a second")
	s.StringVar(&f.healthzIP, "healthz-ip", "127.0.0.1", "`address` for /healthz, /readyz, /metrics, /status, /peers and the page at /")
	s.IntVar(&f.healthzPort, "healthz-port", 8471, "`port` for these; 0 turns them off")
	s.Uint16Var(&f.pprof, "pprof", 0, "`port` on loopback for profiles of the daemon itself; 0 is none")
	s.StringVar(&f.logLevel, "log-level", "info", "`level` from which on to log: debug, info, warn, error")
	s.StringVar(&f.logFormat, "log-format", "console", "`form` of the log: console or json")
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
			return id, usageError{fmt.Errorf("--node-id: this machine has none in %s, set one that is unique and lasting", machineIDFile)}
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
