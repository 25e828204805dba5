use strict;
use warnings;

use Test::More;

use CPANBridge;
use CPANBridge::Error;

sub refusal {
    my ($code) = @_;
    return eval { $code->(); 1 } ? 'nothing was refused' : $@;
}

my $bridge = CPANBridge->new;
is($bridge->{timeout},       60,       'the default of timeout');
is($bridge->{retry_count},   3,        '... of retry_count');
is($bridge->{max_json_size}, 10485760, '... of max_json_size');
is($bridge->{debug},         0,        '... of debug');

like(refusal(sub { CPANBridge->new(timeuot => 5) }),
    qr/Unknown option 'timeuot'; allowed are: debug, max_json_size, retry_count, socket, timeout at \Q$0/,
    'an unknown option is named, with what is allowed, and where');
like(refusal(sub { CPANBridge->new('timeout') }), qr/names and values/, 'a name without a value');

is(`$^X -Ilib -M$_ -MCPANBridge -e 'print join " ", \@{ CPANBridge->new(timeout => 0.5, retry_count => 2) }{qw(timeout retry_count)}'`,
    '0.5 2', "numbers under use $_") for qw(bignum bigrat);

subtest 'a subclass' => sub {
    { package Plain;   our @ISA = ('CPANBridge') }
    { package Helper;  our @ISA = ('CPANBridge'); sub new { my ($class, @given) = @_; return $class->SUPER::new(@given) } }
    { package Further; our @ISA = ('Helper') }
    for my $class (qw(Helper Further)) {
        my $helper = $class->new(dsn => 'dbi:x', host => 'h', -cipher => 'AES', timeout => 7, retry_count => 0, debug => undef);
        is_deeply([ @{$helper}{qw(timeout retry_count debug)} ], [ 7, 0, 0 ], "$class hands on options of its own");
        ok(!exists $helper->{dsn}, '... which are left to it');
    }
    is_deeply([ @{ Helper->new(timeout => 0, max_json_size => '', retry_count => undef) }{qw(timeout max_json_size retry_count)} ],
        [ 60, 10485760, 3 ], 'what is empty has its default');
    isa_ok(Helper->new('the key'), 'Helper', 'arguments that are not pairs');
    like(refusal(sub { Helper->new(timeout => 'soon') }), qr/timeout must be/, 'an impossible value is refused');
    like(refusal(sub { Plain->new(dsn => 1) }), qr/Unknown option 'dsn'; allowed are/, 'a direct new of a subclass is strict');
    { package Ending; our @ISA = ('CPANBridge'); sub DESTROY { my ($self) = @_; $self->SUPER::DESTROY; return } }
    my @warnings;
    { local $SIG{__WARN__} = sub { push @warnings, @_ }; Ending->new }
    is("@warnings", '', 'a DESTROY may go on to that of the bridge');
    is(Helper->new->_safe_json_encode({ a => [ "x\n", 1.5 ] }), '{"a":["x\n",1.5]}', '_safe_json_encode');
    like(refusal(sub { Helper->new->_safe_json_encode([ 9**9**9 ]) }),
        qr/JSON encoding failed: \$data->\[0\] cannot be sent: an infinite number/, '... of what has no JSON');
};

is(CPANBridge->new(timeout => 0.25)->{timeout}, 0.25, 'a fraction of a second');
is(CPANBridge->new(timeout => '5')->{timeout},  5,    'a number from a command line');
for my $bad (undef, 0, -1, 'soon', '', 9**9**9, -sin 9**9**9, []) {
    my $shown = defined $bad ? "'$bad'" : 'undef';
    like(refusal(sub { CPANBridge->new(timeout => $bad) }), qr/timeout must be/, "timeout => $shown");
    like(refusal(sub { $bridge->set_timeout($bad) }),       qr/timeout must be/, "set_timeout($shown)");
}
like(refusal(sub { $bridge->set_retry_count($_) }),   qr/retry_count must be/,   'a bad retry_count')   for -1, 1.5, 'x';
like(refusal(sub { $bridge->set_max_json_size($_) }), qr/max_json_size must be/, 'a bad max_json_size') for 0, -1, '10M';
like(refusal(sub { CPANBridge->new(socket => '') }),  qr/socket must be/,        'an empty socket');
like(refusal(sub { CPANBridge->new(timeout => 2e9) }), qr/above 0 and at most 1e9 at \Q$0/, 'a timeout that is too long');
like(refusal(sub { CPANBridge->$_('a', 'b') }), qr/\A$_ is an object method: use CPANBridge->new at \Q$0/, "$_ of the class")
    for qw(call call_python);
like(refusal(sub { CPANBridge->call_many([]) }), qr/\Acall_many is an object method/, 'call_many of the class');
is($bridge->{timeout}, 60, 'a refused value changes nothing');

$bridge->set_timeout(1)->set_retry_count(0)->set_max_json_size(1000)->set_debug('yes');
is_deeply([ @{$bridge}{qw(timeout retry_count max_json_size debug)} ], [ 1, 0, 1000, 1 ], 'options can be changed');

is_deeply(
    { %{ $bridge->get_performance_stats }, success_rate => 0 },
    {
        map { $_ => 0 } qw(total_calls successful_calls failed_calls success_rate total_time average_time
            min_time max_time retries reconnects bytes_sent bytes_received)
    },
    'the statistics of no calls'
);
is($bridge->get_last_error, undef, 'no error yet');

subtest 'errors' => sub {
    my %fields = (message => 'm', error_type => 'T', module => 'a', function => 'b', duration => 1,
        request_id => 'r', traceback => 't', retry_after => 2);
    my $error = CPANBridge::Error->new(%fields);
    is($error->$_, $fields{$_}, $_) for sort keys %fields;
    is("$error", 'm', 'as a string, its message');
    eval { CPANBridge::Error->throw(%fields) };
    is($@->line, __LINE__ - 1, 'throw knows the line');
    is("$@", "m at $0 line " . (__LINE__ - 2) . ".\n", '... and shows it');
    ok(CPANBridge::Error->new(message => ''), 'an error is true');
};

done_testing;
